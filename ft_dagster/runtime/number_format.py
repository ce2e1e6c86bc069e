"""The number format that a machine computes in: chosen by how fast its matrix products are. Imports no torch.

A process of its own (model/products.py) times products once for each processor, GPU and version of torch; the
answer is kept in FT_CACHE. Nothing that is stale, and no key of an adapter, depends on it.
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
"""A format is called slow where products take this many times as long as in the machine's own choice."""
_HOPELESS = 10.0
"""An attempt that began in another format goes on in it unless products take more than this many times as long:
beyond that, to start over is sooner done."""
_AS_FAST = 0.8
"""bfloat16 is chosen where its products are at least this share as fast as in float32: weights take half the memory."""
_PATIENCE_SECONDS = 300
_FORCED = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that make the libraries use fewer of a processor's instructions than it has."""


class UnknownRatesError(UserError):
    """The machine's products could not be timed; the message says why."""


@dataclass(frozen=True)
class ProductRates:
    """How fast a machine multiplies matrices."""

    device: str
    """The GPU's name, or `cpu`."""
    rates: Mapping[str, float]
    """Format -> operations a second of the GPU, or of one core; formats that the device does not have are missing."""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def best(self) -> str:
        """The format that `base.dtype: auto` stands for on this machine."""
        bfloat16 = self.rates.get("bfloat16", 0.0)
        if self.on_gpu:
            return "bfloat16" if bfloat16 else "float16"
        return "bfloat16" if bfloat16 >= _AS_FAST * self.rates["float32"] else "float32"

    def slowdown(self, number_format: str) -> float:
        """How many times as long products take as in `best`; infinite where the device does not have the format."""
        rate = self.rates.get(number_format, 0.0)
        return self.rates[self.best] / rate if rate else float("inf")

    def can_go_on_in(self, number_format: str) -> bool:
        """Whether a training that began in this format elsewhere is better continued here than started over."""
        return self.slowdown(number_format) <= _HOPELESS


def known_rates(cache: Path) -> ProductRates | None:
    """What was measured on this machine before; None where nothing was, or it cannot be read."""
    try:
        return ProductRates(**json.loads(_file(cache).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def remember_rates(cache: Path, rates: ProductRates) -> None:
    """Keep what was measured on this machine, where FT_CACHE can be written to."""
    with suppress(OSError):  # it is measured again
        write_atomically(_file(cache), json.dumps(asdict(rates)))


def machine_rates(cache: Path) -> ProductRates:
    """How fast this machine multiplies, measured in a process of its own where that is not known (some seconds).

    Raises:
        UnknownRatesError: the process failed; most likely torch cannot be imported.
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
    """The recipe with its number format decided for this machine.

    Raises:
        UnknownRatesError: the recipe leaves it to the machine, and the machine cannot be measured.
    """
    if recipe.base.dtype != AUTO:
        return recipe
    return recipe.computing_in(machine_rates(settings.cache).best)


def slowness(recipe: Recipe, rates: ProductRates) -> str | None:
    """What to change where a recipe names a format in which this machine is slow; None where it is not.

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
        return f"{line} in the recipe is a format that this machine does not compute in. Write {change}."
    return (
        f"{line} in the recipe is slow on this machine: its matrix products take about {factor:.0f} times as long as "
        f"in {rates.best}. Write {change}."
    )


def _file(cache: Path) -> Path:
    here = {
        "processor": [processor(), instructions()],
        "devices": sorted({device.model for device in visible_devices() if device.model}),
        "torch": version("torch"),
        "forced": {name: os.environ.get(name) for name in _FORCED},
    }
    return cache / "machines" / f"{digest(here)[:32]}.json"
