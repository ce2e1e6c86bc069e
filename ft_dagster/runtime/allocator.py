"""How this process keeps memory, and how its threads wait: what the C libraries are told."""

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8
"""Names of options in glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Keep what tensors free for the next ones, instead of giving it back to the system.

    glibc maps large blocks anew each time, and the kernel fills every page with zeros: a float32 softmax over 256 x
    49,152 logits took six times as long as the computation. All threads share one arena, because the others,
    which further threads get, map blocks of more than 64 MB anew. Elsewhere than on glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_ARENA_MAX, 1)


def spin_briefly() -> None:
    """Let OpenMP's threads spin for some microseconds while they wait, then sleep. Before torch is imported.

    Spinning for long burns the time of whoever shares the machine: beside other work a training took several times as
    long. Not to spin at all cost a training on an idle machine a third of its speed, because parallel regions follow
    each other closely.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
