"""Estimates of a training before it starts: its memory by the formula, its time as last measured on this machine."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ft_dagster.base.model_folder import BaseModelError, model_config
from ft_dagster.base.prepare import local_base
from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.runtime.machine import has_gpu, memory_for_process
from ft_dagster.runtime.number_format import ProductRates, UnknownRatesError, machine_rates, slowness
from ft_dagster.training.layout import known_layout
from ft_dagster.training.sizing.duration import estimated_seconds
from ft_dagster.training.sizing.fitting import fit
from ft_dagster.training.sizing.shape import UnknownModelError, shape_of
from ft_dagster.training.sizing.speeds import recall_speed, speed_key

_ASSUMED = "bfloat16"
"""The number format that the memory estimate assumes where another machine trains."""


@dataclass
class TrainingCost:
    """Time and peak memory of one training."""

    memory_bytes: int | None = None
    """Memory of each process, by the formula. None where the formula does not know the model, or the model is not on
    this machine."""
    memory_parts: dict[str, int] = field(default_factory=dict)
    measured_memory_bytes: int | None = None
    """Peak memory of the last training of the same shape on this machine."""
    seconds: float | None = None
    """Time at the speed that was measured last for the same shape of model, recipe and machine. Before the first
    measurement, it is computed from the model's operations and the rate of this machine's matrix products. None where
    neither is known."""
    measured_on: str | None = None
    """The device on which speed and memory were measured. None where the time is computed."""
    number_format: str | None = None
    """The number format of matrix products on this machine. None where another machine decides it, or it is unknown."""
    where: str | None = None
    """Where the number format is decided, if not on this machine."""
    slow: str | None = None
    """What to change if the recipe names a number format in which this machine is slow."""
    layout: str | None = None
    """How pieces of text are given to the base: `packed`, or `padded`. None until it has been tried on this machine."""
    problem: str | None = None
    """Why there is no memory estimate, or what to change because it exceeds the available memory."""


def training_cost(settings: Settings, recipe: Recipe, tokens: float) -> TrainingCost:
    """Estimate the time and memory of a training, without loading or downloading anything.

    Where this machine has not been measured yet, a process is started that times a few matrix products.

    Args:
        settings: say where models and measured speeds are.
        recipe: what to train.
        tokens: the number of tokens in all epochs together.
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
            cost.where = "a Slurm job decides it on its own node"
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
        cost.layout = known_layout(Path(base.folder), recipe, settings.cache)
    except BaseModelError as error:
        cost.problem = str(error)
        return cost
    _estimate_time(cost, settings, recipe, config, rates, tokens)
    on_gpu = rates.on_gpu if rates else has_gpu()
    try:
        found = fit(config, recipe, on_gpu, memory_for_process() // recipe.training.processes)
    except UnknownModelError as error:
        cost.problem = str(error)
        return cost
    cost.memory_bytes, cost.memory_parts = found.estimate.total, asdict(found.estimate)
    if found.advice and not on_gpu:  # only the training process knows a GPU's memory
        verdict = "will be refused" if found.is_refused else "may fail"
        cost.problem = f"{found.available / 2**30:.2f} GiB are available, so it {verdict}. {found.advice}"
    return cost


def _estimate_time(
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
        with suppress(UnknownModelError):  # the memory estimate reports it
            cost.seconds = estimated_seconds(shape_of(config), recipe, rates, tokens, settings.threads)
