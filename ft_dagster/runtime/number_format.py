"""The number format in which a machine computes, chosen by the speed of its matrix products. Imports no torch.

A separate process (model/products.py) times matrix products once for each processor, GPU and version of torch, and the
result is kept in FT_CACHE. Neither what counts as stale nor the key of an adapter depends on it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.config.redaction import child_environment
from ft_dagster.config.settings import Settings
from ft_dagster.errors import UserError
from ft_dagster.runtime.lease import visible_devices
from ft_dagster.runtime.machine import instructions, processor
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import write_atomically

FORMATS = ("float32", "bfloat16", "float16")
SLOW = 2.0
"""A format is slow if products take at least this many times as long as in the format that the machine would choose."""
_TOO_SLOW_TO_CONTINUE = 10.0
"""An attempt that started in another format continues in it unless products take more than this many times as long.
Beyond that, starting over takes less time."""
_FAST_ENOUGH = 0.8
"""bfloat16 is chosen if its products reach at least this share of the speed in float32, because weights take half the
memory."""
_PATIENCE_SECONDS = 300
_OVERRIDES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that make the libraries use fewer of a processor's instructions than it has."""


class UnknownRatesError(UserError):
    """The matrix products of this machine could not be timed; the message gives the reason."""


@dataclass(frozen=True)
class ProductRates:
    """How fast a machine multiplies matrices."""

    device: str
    """The GPU's name, or `cpu`."""
    rates: Mapping[str, float]
    """Format -> operations per second of the GPU, or of one CPU core. Formats that the device does not support are
    missing."""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def best(self) -> str:
        """The format that `base.dtype: auto` stands for on this machine."""
        bfloat16 = self.rates.get("bfloat16", 0.0)
        if self.on_gpu:
            return "bfloat16" if bfloat16 else "float16"
        return "bfloat16" if bfloat16 >= _FAST_ENOUGH * self.rates["float32"] else "float32"

    def slowdown(self, number_format: str) -> float:
        """Return how many times as long products take as in `best`; infinity if the device lacks the format."""
        rate = self.rates.get(number_format, 0.0)
        return self.rates[self.best] / rate if rate else float("inf")

    def can_go_on_in(self, number_format: str) -> bool:
        """Whether a training that started elsewhere in this format should be continued here instead of started over."""
        return self.slowdown(number_format) <= _TOO_SLOW_TO_CONTINUE


def known_rates(cache: Path) -> ProductRates | None:
    """Return what was measured on this machine before, or None if there is no measurement that can be read."""
    try:
        return ProductRates(**json.loads(_file(cache).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def remember_rates(cache: Path, rates: ProductRates) -> None:
    """Save what was measured on this machine, if FT_CACHE can be written to."""
    with suppress(OSError):  # otherwise it is measured again
        write_atomically(_file(cache), json.dumps(asdict(rates)))


def machine_rates(cache: Path) -> ProductRates:
    """Return how fast this machine multiplies matrices.

    If that is not known yet, a separate process measures it, which takes some seconds.

    Raises:
        UnknownRatesError: the process failed, most likely because torch cannot be imported.
    """
    if known := known_rates(cache):
        return known
    command = [sys.executable, "-m", "ft_dagster.model.products", str(cache)]
    try:
        done = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True
        )
        return ProductRates(**json.loads(done.stdout))
    except (subprocess.SubprocessError, ValueError, TypeError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise UnknownRatesError(
            f"The matrix products of this machine cannot be timed: {said[-1] if said else error!r}. Install torch "
            "again, or name a format in the recipe: base.dtype: float32."
        ) from error


def resolved_here(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with its number format decided for this machine.

    Raises:
        UnknownRatesError: the recipe leaves the format to the machine, and the machine cannot be measured.
    """
    if recipe.base.dtype != AUTO:
        return recipe
    return recipe.computing_in(machine_rates(settings.cache).best)


def slowness(recipe: Recipe, rates: ProductRates) -> str | None:
    """Return what to change if a recipe names a format in which this machine is slow; None if it does not.

    >>> rates = ProductRates("cpu", {"float32": 80e9, "bfloat16": 1e9})
    >>> recipe = Recipe(name="mine", base={"source": "embedded", "model": "m", "dtype": "bfloat16"})
    >>> slowness(recipe, rates)
    'base.dtype: bfloat16 in the recipe is slow on this machine: its matrix products take about 80 times as long as in \
float32. Write base.dtype: auto, or float32.'
    """
    if recipe.base.dtype == AUTO or (factor := rates.slowdown(recipe.compute_dtype)) < SLOW:
        return None
    mixed = recipe.training.mixed_precision
    line = f"training.mixed_precision: {mixed}" if mixed else f"base.dtype: {recipe.base.dtype}"
    change = "training.mixed_precision: null" if mixed else f"base.dtype: auto, or {rates.best}"
    if factor == float("inf"):
        return f"{line} in the recipe is a format that this machine cannot compute in. Write {change}."
    return (
        f"{line} in the recipe is slow on this machine: its matrix products take about {factor:.0f} times as long as "
        f"in {rates.best}. Write {change}."
    )


def _file(cache: Path) -> Path:
    here = {
        "processor": [processor(), instructions()],
        "devices": sorted({device.model for device in visible_devices() if device.model}),
        "torch": version("torch"),
        "forced": {name: os.environ.get(name) for name in _OVERRIDES},
    }
    return cache / "machines" / f"{digest(here)[:32]}.json"
