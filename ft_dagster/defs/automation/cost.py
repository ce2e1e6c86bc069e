"""What a training will take on this machine, told without starting it: memory by the formula, time as last measured."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ft_dagster.base.prepare import BaseModelError, local_base, model_config
from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.runtime.machine import has_gpu, memory_for_process
from ft_dagster.runtime.number_format import ProductRates, UnknownRatesError, machine_rates, slowness
from ft_dagster.training.sizing.duration import estimated_seconds
from ft_dagster.training.sizing.fitting import fit
from ft_dagster.training.sizing.shape import UnknownModelError, shape_of
from ft_dagster.training.sizing.speeds import recall_speed, speed_key

_ASSUMED = "bfloat16"
"""The number format that memory is told for where the machine that trains is another one."""


@dataclass
class TrainingCost:
    """Time and peak memory of one training."""

    memory_bytes: int | None = None
    """Of each process, by the formula; None where it does not know the model, or the model is not on this machine."""
    memory_parts: dict[str, int] = field(default_factory=dict)
    measured_memory_bytes: int | None = None
    """Of the last training of the same shape here."""
    seconds: float | None = None
    """At the speed that was measured last for the same shape of model, recipe and machine; before that, from the
    model's operations and how fast this machine multiplies. None where neither is known."""
    measured_on: str | None = None
    """The device that speed and memory were measured on; None where the time is an estimate."""
    number_format: str | None = None
    """What products are computed in on this machine; None where that is decided elsewhere, or cannot be told."""
    where: str | None = None
    """What else decides the number format, in a sentence."""
    slow: str | None = None
    """What to change where the recipe names a format in which this machine is slow."""
    problem: str | None = None
    """Why there is no estimate of memory, or what to change because it exceeds what is there."""


def training_cost(settings: Settings, recipe: Recipe, tokens: float) -> TrainingCost:
    """What training on so many tokens in all will take. Loads and downloads nothing.

    Where this machine has not been measured yet, a process is started that multiplies some matrices.

    Args:
        settings: where models and measured speeds are.
        recipe: what to train.
        tokens: of all epochs.
    """
    cost, rates = TrainingCost(), None
    if settings.executor == "local":
        try:
            rates = machine_rates(settings.cache)
            cost.slow = slowness(recipe, rates)
        except UnknownRatesError as error:
            if recipe.base.dtype == AUTO:
                cost.problem = str(error)
                return cost
        if recipe.base.dtype == AUTO and shutil.which("sbatch") and "SLURM_JOB_ID" not in os.environ:
            cost.where = "a job of Slurm decides it where it runs"
        recipe = recipe.computing_in(rates.best) if rates else recipe
        cost.number_format = recipe.compute_dtype
    elif recipe.base.dtype == AUTO:
        recipe = recipe.computing_in(_ASSUMED)
        cost.where = "decided where the step runs"
    try:
        base = local_base(recipe.base, settings.cache)
        if base is None:
            cost.problem = "the base model is not on this machine yet"
            return cost
        config = model_config(Path(base.folder))
    except BaseModelError as error:
        cost.problem = str(error)
        return cost
    _tell_time(cost, settings, recipe, config, rates, tokens)
    on_gpu = rates.on_gpu if rates else has_gpu()
    try:
        found = fit(config, recipe, on_gpu, memory_for_process() // recipe.training.processes)
    except UnknownModelError as error:
        cost.problem = str(error)
        return cost
    cost.memory_bytes, cost.memory_parts = found.estimate.total, asdict(found.estimate)
    if found.advice and not on_gpu:  # how much a GPU has is known to the process that trains
        verdict = "will be refused" if found.is_refused else "may fail"
        cost.problem = f"{found.available / 2**30:.2f} GiB are there, so it {verdict}. {found.advice}"
    return cost


def _tell_time(
    cost: TrainingCost,
    settings: Settings,
    recipe: Recipe,
    config: Mapping[str, Any],
    rates: ProductRates | None,
    tokens: float,
) -> None:
    if speed := recall_speed(settings.speeds, speed_key(config, recipe, settings.threads)):
        cost.seconds = tokens / speed.tokens_per_second
        cost.measured_memory_bytes, cost.measured_on = speed.peak_memory_bytes, speed.device
    elif rates:
        with suppress(UnknownModelError):  # the estimate of memory says it
            cost.seconds = estimated_seconds(shape_of(config), recipe, rates, tokens, settings.threads)
