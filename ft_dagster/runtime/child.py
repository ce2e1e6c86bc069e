"""The start, exit codes and error messages that the processes that train, measure, merge and generate share."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ft_dagster.errors import UserError
from ft_dagster.runtime.disk import reports_full_disk

FAILED, INTERRUPTED = 1, 130
"""Exit codes."""
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
LESS_MEMORY = (
    "Lower training.rows_per_device or tokens.block_length, set training.gradient_checkpointing: true or "
    "base.quantization: nf4, or close other programs."
)
"""What to change if there was too little memory. If the missing amount is known, `training.sizing.fitting.advice` is
more specific."""
TRAINING_MAY_USE_IT = "A training may be using it; try again when that has finished."
_NO_MEMORY = ("allocate memory", "out of memory")


def run_child(module: str, main: Callable[[Path], int]) -> NoReturn:
    """Run `main` as `python -m MODULE REQUEST.json`, and exit with the code that it returns."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {module} REQUEST.json")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    sys.exit(main(Path(sys.argv[1])))


def exit_code(work: Callable[[], int], folder: Path, advice: str = LESS_MEMORY) -> int:
    """Run `work` and return its exit code. Errors that a user can fix are printed as one message, without a traceback.

    Args:
        work: returns its own exit code.
        folder: folder that `work` writes to; the message names it if its disk is full.
        advice: what to change if there was too little memory.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        _print(str(error))
    except Exception as error:
        reason = exhausted(error, folder, advice)
        if reason is None:
            raise
        _print(f"{error}\n{reason}")
    return FAILED


def exhausted(error: BaseException, folder: Path, advice: str = LESS_MEMORY) -> str | None:
    """Return what to do about an error caused by full memory or a full disk of `folder`; None for any other error.

    Libraries wrap the system's error in classes of their own, so only the words of an error show what it is about.
    """
    said = str(error).lower()
    if isinstance(error, MemoryError) or any(part in said for part in _NO_MEMORY):
        return f"There is not enough memory. {advice}"
    if reports_full_disk(said):
        return f"The disk that holds {folder} is full. Make space and run again: finished work is kept."
    return None


def _print(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
