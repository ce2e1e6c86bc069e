"""Measure time on a device that works asynchronously."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ft_dagster.model.device import device


def on_gpu() -> bool:
    return device().type == "cuda"


def seconds_of(step: Callable[[], Any], repeats: int = 5, at_most: float = 5.0) -> float:
    """Return the median seconds of a step, synchronized with the device.

    Args:
        step: the step, which is run once as a warm-up, and then at least twice.
        repeats: the number of measurements.
        at_most: the number of seconds after which no further measurement starts.
    """

    def once() -> float:
        began = time.perf_counter()
        step()
        if on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    until = time.monotonic() + once() + at_most
    taken = [once(), once()]
    while len(taken) < repeats and time.monotonic() < until:
        taken.append(once())
    return statistics.median(taken)


def product_rate() -> float:
    """Return operations per second of a large square product in bfloat16, the machine's rate that MFU refers to."""
    size = 8192 if on_gpu() else 512
    left, right = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, 20)
