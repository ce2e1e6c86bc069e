"""`python -m ft_dagster.evaluation.terminal REQUEST.json`: talk to an adapter in the terminal that started the process.

Exit codes: 0 done, 1 failed, 130 interrupted.
"""

import logging
import warnings
from pathlib import Path

from rich.console import Console

from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.runtime.allocator import keep_freed_memory
from ft_dagster.runtime.child import TRAINING_MAY_USE_IT, exit_code, run_child
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly


def main(request_path: Path) -> int:
    """Talk, and return the exit code."""
    warnings.simplefilter("ignore")  # warnings for developers would appear among the answers
    logging.disable(logging.WARNING)

    def answer() -> int:
        keep_freed_memory()
        request = TalkRequest.read(request_path)
        compile_nothing(request.resolved_recipe())
        import_quickly("ft_dagster.evaluation.talk")
        from ft_dagster.evaluation.talk import talk

        talk(request, Console(stderr=True))
        return 0

    return exit_code(answer, request_path.parent, advice=TRAINING_MAY_USE_IT)


if __name__ == "__main__":
    run_child("ft_dagster.evaluation.terminal", main)
