"""What the child processes that train, measure, merge and generate have in common: their start, and how they end."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ft_dagster.errors import UserError

FAILED, INTERRUPTED = 1, 130
"""Exit codes."""
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
LESS_MEMORY = (
    "Lower training.rows_per_device or tokens.block_length, set training.gradient_checkpointing: true or "
    "base.quantization: nf4, or close other programs."
)
"""What to change where memory was too little. `training.fitting.advice` says more where it is known how little."""
TRAINING_MAY_USE_IT = "A training may be using it; try again when it has ended."
_NO_MEMORY = ("allocate memory", "out of memory")
_NO_SPACE = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter failed writing", "unexpected pos")


def run_child(module: str, main: Callable[[Path], int]) -> NoReturn:
    """End this process, `python -m MODULE REQUEST.json`, with the exit code of `main`."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {module} REQUEST.json")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    sys.exit(main(Path(sys.argv[1])))


def exit_code(work: Callable[[], int], folder: Path, advice: str = LESS_MEMORY) -> int:
    """Do the work, and give its exit code; what a person can fix is one message on standard error, without a traceback.

    Args:
        work: gives its own exit code.
        folder: that it writes to, named where its disk is full.
        advice: what to change where memory was too little.
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
    """What to do about an error that says that memory, or the disk of a folder, is full; None for any other.

    Libraries wrap the system's error in classes of their own, so only its words tell.
    """
    said = str(error).lower()
    if isinstance(error, MemoryError) or any(part in said for part in _NO_MEMORY):
        return f"There is not enough memory. {advice}"
    if any(part in said for part in _NO_SPACE):
        return f"The disk that holds {folder} is full. Make space and run again: it goes on with what was finished."
    return None


def _print(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
