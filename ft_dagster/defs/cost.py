"""What a training will take on this machine, told without starting it: memory by the formula, time as last measured."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ft_dagster.base import BaseModelError, local_base, model_config
from ft_dagster.recipe import Recipe
from ft_dagster.settings import Settings
from ft_dagster.training.estimate import memory_estimate
from ft_dagster.training.fitting import MARGIN, advice
from ft_dagster.training.machine import has_gpu, memory_for_process
from ft_dagster.training.shape import UnknownModelError
from ft_dagster.training.speeds import recall_speed, speed_key


@dataclass
class TrainingCost:
    """Time and peak memory of one training."""

    memory_bytes: int | None = None
    """Of each process, by the formula; None where it does not know the model, or the model is not on this machine."""
    memory_parts: dict[str, int] = field(default_factory=dict)
    measured_memory_bytes: int | None = None
    """Of the last training of the same shape here."""
    seconds: float | None = None
    """At the speed that was measured last for the same shape of model, recipe and machine; None before that."""
    measured_on: str | None = None
    """The device that speed and memory were measured on."""
    problem: str | None = None
    """Why there is no estimate of memory, or what to change because it exceeds what is there."""


def training_cost(settings: Settings, recipe: Recipe, tokens: float) -> TrainingCost:
    """What training on so many tokens in all will take. Loads and downloads nothing, and asks no GPU.

    Args:
        settings: where models and measured speeds are.
        recipe: what to train.
        tokens: of all epochs.
    """
    cost = TrainingCost()
    try:
        base = local_base(recipe.base, settings.cache)
        if base is None:
            return TrainingCost(problem="the base model is not on this machine yet")
        config = model_config(Path(base.folder))
    except BaseModelError as error:
        return TrainingCost(problem=str(error))
    speed = recall_speed(settings.speeds, speed_key(config, recipe, settings.threads))
    if speed:
        cost.seconds = tokens / speed.tokens_per_second
        cost.measured_memory_bytes, cost.measured_on = speed.peak_memory_bytes, speed.device
    on_gpu = speed.device != "cpu" if speed else has_gpu()
    try:
        estimate = memory_estimate(config, recipe, on_gpu)
    except UnknownModelError as error:
        cost.problem = str(error)
        return cost
    cost.memory_bytes, cost.memory_parts = estimate.total, asdict(estimate)
    if not on_gpu and estimate.total > (room := memory_for_process() // recipe.training.processes):
        verdict = "will be refused" if estimate.total > MARGIN * room else "may fail"
        cost.problem = f"{room / 2**30:.2f} GiB are there, so it {verdict}. {advice(config, recipe, on_gpu, room)}"
    return cost
