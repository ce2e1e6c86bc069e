"""`python -m ft_dagster.evaluation REQUEST.json`: measure adapters against their base. Exit codes: 0 done, 1 failed."""

import logging
import sys
from pathlib import Path

from ft_dagster.errors import UserError
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.training.allocator import keep_freed_memory, spin_briefly
from ft_dagster.training.lease import leased
from ft_dagster.training.processes import out_of_room
from ft_dagster.training.quick_start import compile_nothing, import_quickly


def main(request_path: Path) -> int:
    spin_briefly()
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = EvaluationRequest.read(request_path)
    with leased(Path(request.locks)):  # before anything looks at the GPUs, as bitsandbytes does when it is imported
        return _measure(request)


def _measure(request: EvaluationRequest) -> int:
    compile_nothing(request.resolved_recipe())
    import_quickly("ft_dagster.evaluation.evaluate")
    from ft_dagster.evaluation.evaluate import evaluate

    try:
        evaluate(request)
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except Exception as error:
        if (reason := out_of_room(error, Path(request.output))) is None:
            raise
        print(f"{error}\n{reason}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ft_dagster.evaluation REQUEST.json")
    sys.exit(main(Path(sys.argv[1])))
