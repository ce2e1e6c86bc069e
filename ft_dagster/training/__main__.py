"""`python -m ft_dagster.training REQUEST.json`: make one adapter. Exit codes: 0 made, 1 failed, 130 interrupted.

It takes the devices that it needs and trains. Where the recipe asks for several processes it starts them, each of
which comes through here again, and waits for them.
"""

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes  # the protocol alone: it does not import Dagster

from ft_dagster.errors import UserError
from ft_dagster.runtime.parent import die_with_parent
from ft_dagster.training.allocator import keep_freed_memory, spin_briefly
from ft_dagster.training.lease import leased
from ft_dagster.training.messages import report
from ft_dagster.training.processes import (
    FAILED,
    INTERRUPTED,
    LESS_MEMORY,
    leave,
    out_of_room,
    run_together,
)
from ft_dagster.training.quick_start import compile_nothing, import_quickly
from ft_dagster.training.request import RENDEZVOUS, TrainingRequest


def main(request_path: Path) -> int:
    one_of_several = RENDEZVOUS in os.environ
    first = os.environ.get("RANK", "0") == "0" or not one_of_several
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    request = TrainingRequest.read(request_path)
    if one_of_several:
        die_with_parent()
        leave(_make(request, reports=first))
    processes = request.resolved_recipe().training.processes
    try:
        with leased(Path(request.locks), processes):
            if processes == 1:
                return _make(request, reports=True)
            return run_together("ft_dagster.training", request_path, processes, _threads(request) // processes)
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return FAILED


def _threads(request: TrainingRequest) -> int:
    return request.threads or os.cpu_count() or 1


def _make(request: TrainingRequest, reports: bool) -> int:
    spin_briefly()
    keep_freed_memory()
    compile_nothing(request.resolved_recipe())
    started_by_a_run = reports and "DAGSTER_PIPES_CONTEXT" in os.environ
    with open_dagster_pipes() if started_by_a_run else nullcontext() as pipes:
        import_quickly("ft_dagster.training.train")
        import torch

        from ft_dagster.training.ranks import joined
        from ft_dagster.training.train import InterruptedTrainingError, train

        def tell(metrics: dict[str, Any]) -> None:
            if isinstance(pipes, PipesContext):
                report(pipes, metrics)

        try:
            with joined():
                train(request, tell)
        except InterruptedTrainingError as stopped:
            if reports:
                print(f"Training {stopped}; the next run goes on from there.", file=sys.stderr)  # noqa: T201
            return INTERRUPTED
        except UserError as error:
            print(error, file=sys.stderr)  # noqa: T201
            return FAILED
        except torch.OutOfMemoryError as error:
            print(f"{error}\nThe GPU has too little memory for this recipe. {LESS_MEMORY}", file=sys.stderr)  # noqa: T201
            return FAILED
        except Exception as error:
            if (reason := out_of_room(error, Path(request.attempt))) is None:
                raise
            print(f"{error}\n{reason}", file=sys.stderr)  # noqa: T201
            return FAILED
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ft_dagster.training REQUEST.json")
    sys.exit(main(Path(sys.argv[1])))
