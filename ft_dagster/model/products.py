"""Measure how fast this machine multiplies matrices by number format: `python -m ft_dagster.model.products CACHE`."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache as cache_results
from pathlib import Path

import torch

from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.runtime.number_format import FORMATS, ProductRates, known_rates, remember_rates

_SHAPES = {"cpu": (256, 768, 768), "cuda": (4096, 4096, 4096)}
"""Rows, inputs and outputs. On a CPU those of a layer of a small model, 0.3 s in the slowest format ever measured."""
_SECONDS = 0.25
"""How long each format is measured, with at least two products."""


def rates_here(cache: Path | None) -> ProductRates:
    """Return this machine's rates from FT_CACHE, or measure them. Without FT_CACHE, each process measures once."""
    if cache is None:
        return _of_this_process()
    if known := known_rates(cache):
        return known
    rates = time_products()
    remember_rates(cache, rates)
    return rates


def decided(recipe: Recipe, cache: Path | None = None) -> Recipe:
    """Return the recipe with its number format decided for this machine, if the recipe leaves it open."""
    return recipe if recipe.base.dtype != AUTO else recipe.computing_in(rates_here(cache).best)


@cache_results
def _of_this_process() -> ProductRates:
    return time_products()


def time_products() -> ProductRates:
    """Measure matrix products in each number format that the device supports: on a GPU, or on one core of the CPU."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        formats = [name for name in FORMATS if native or name != "bfloat16"]
        return ProductRates(torch.cuda.get_device_name(), {name: _rate(name, "cuda") for name in formats})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # only the thread's own CPU time counts, whatever else the machine does
    try:
        return ProductRates("cpu", {name: _rate(name, "cpu") for name in FORMATS if name != "float16"})
    finally:
        torch.set_num_threads(threads)


def _rate(name: str, device: str) -> float:
    """Return the operations per second of the fastest of several products."""
    rows, inputs, outputs = _SHAPES[device]
    dtype = getattr(torch, name)
    generator = torch.Generator(device).manual_seed(0)  # does not advance the random numbers of a training
    first = torch.randn(rows, inputs, device=device, generator=generator).to(dtype)
    second = torch.randn(inputs, outputs, device=device, generator=generator).to(dtype)
    clock = time.perf_counter if device == "cuda" else time.thread_time
    _timed(first, second, clock)  # a warm-up, in which kernels are chosen and loaded
    taken = [_timed(first, second, clock) for _ in range(2)]
    while sum(taken) < _SECONDS:
        taken.append(_timed(first, second, clock))
    return 2 * rows * inputs * outputs / min(taken)


def _timed(first: torch.Tensor, second: torch.Tensor, clock: Callable[[], float]) -> float:
    began = clock()
    torch.mm(first, second)
    if first.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    json.dump(asdict(rates_here(Path(sys.argv[1]))), sys.stdout)
