"""Child processes that end when their parent ends, however it ends."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have this process killed as soon as the process that started it has ended. This works only on Linux."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "prctl"):
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def dying_with(parent: int) -> Callable[[], None]:
    """Return a `preexec_fn`: the child dies with its parent and reacts to signals, even if the parent ignores them.

    Args:
        parent: id of the process that starts the child.
    """

    def set_up() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent()
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return set_up
