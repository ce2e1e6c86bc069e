"""Child processes that end when their parent ends, however it ends."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on this process is killed when the one that started it is gone. Only Linux can do that."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "prctl"):
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def dying_with(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: the child dies with its parent and handles signals, whatever its parent does with them.

    Args:
        parent: process id of the one that starts the child.
    """

    def set_up() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent()
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return set_up
