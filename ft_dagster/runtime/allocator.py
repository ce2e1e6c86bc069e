"""Settings of the C libraries: how this process keeps freed memory, and how its threads wait."""

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8
"""Numbers of options in glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Keep the memory that tensors free for later tensors, instead of returning it to the system.

    glibc maps large blocks again for each allocation, and the kernel fills every page with zeros: because of this, a
    float32 softmax over 256 x 49,152 logits took six times as long as its computation. All threads share one arena,
    because the arenas that glibc creates for further threads map blocks of more than 64 MB again. With C libraries
    other than glibc, nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has no mallopt
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_ARENA_MAX, 1)


def spin_briefly() -> None:
    """Let waiting OpenMP threads spin for some microseconds and then sleep. Call this before torch is imported.

    Long spinning wastes CPU time that other processes on the machine need: beside other work, a training took several
    times as long. No spinning at all cost a training on an idle machine a third of its speed, because parallel regions
    follow each other closely.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
