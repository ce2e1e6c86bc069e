"""Decide whether a training fits into memory, and find changes of its recipe that make it fit. Imports no torch."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.training.sizing.estimate import MemoryEstimate, memory_estimate

MARGIN = 1.25
"""A training is refused if its estimate exceeds this multiple of the available memory. Estimates were at most 17 %
above published and measured figures (docs/memory.md); refusing a training that would fit is worse than failing late."""


@dataclass(frozen=True)
class Fit:
    """The estimated memory of a training, compared with the available memory."""

    estimate: MemoryEstimate
    available: int
    """Available bytes for each process that trains."""
    advice: str
    """What to change; empty if the training fits."""

    @property
    def is_refused(self) -> bool:
        """Whether the training is so much too large that it is refused."""
        return self.estimate.total > MARGIN * self.available


def fit(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> Fit:
    """Compare the estimated memory of a training with the available memory.

    Args:
        config: the content of the base's config.json.
        recipe: the recipe of the training.
        on_gpu: whether it is the memory of a GPU, or that of the machine.
        available: the available bytes for each process that trains.

    Raises:
        UnknownModelError: the formula does not support the model.
    """
    estimate = memory_estimate(config, recipe, on_gpu)
    return Fit(estimate, available, "" if estimate.total <= available else advice(config, recipe, on_gpu, available))


def changes_that_fit(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> dict[str, Any]:
    """Return recipe fields and values with which a training fits into `available` bytes; empty if there are none.

    Every combination is estimated with the formula. Changes that do not affect the adapter are preferred (attention,
    gradient checkpointing, rows per device, as many as fit), then 4-bit weights, then shorter blocks.
    """
    training, length = recipe.training, recipe.tokens.block_length
    rows = [n for n in range(training.rows_per_device - 1, 0, -1) if training.rows_per_step % n == 0]
    choices: list[tuple[str, int, list[Any]]] = [  # field, cost of changing it, values
        ("training.attention", 1, ["sdpa"] if training.attention != "sdpa" else []),
        ("training.gradient_checkpointing", 1, [] if training.gradient_checkpointing else [True]),
        ("training.rows_per_device", 1, rows),
        ("base.quantization", 4, [] if recipe.base.quantization == "nf4" else ["nf4"]),
        ("tokens.block_length", 8, [length // n for n in (2, 4, 8) if length // n >= 128]),
    ]
    costs = {field: cost for field, cost, _ in choices}
    combinations = [
        {field: value for field, value in zip(costs, values, strict=True) if value is not None}
        for values in itertools.product(*([None, *values] for _, _, values in choices))
    ]
    for changes in sorted(combinations, key=lambda changes: sum(costs[field] for field in changes)):
        if memory_estimate(config, with_changes(recipe, changes), on_gpu).total <= available:
            return changes
    return {}


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with changed values of some fields, which are named like `training.rows_per_device`."""
    content = recipe.model_dump(mode="json")
    for field, value in changes.items():
        part, _, name = field.partition(".")
        content[part][name] = value
    return resolve_recipe(content)


def advice(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> str:
    """Return advice, a sentence or two, for a training that does not fit into `available` bytes."""
    changes = changes_that_fit(config, recipe, on_gpu, available)
    if not changes:
        return (
            "Neither training.gradient_checkpointing, training.rows_per_device, base.quantization nor "
            "tokens.block_length makes it fit: choose a smaller base model, or free memory."
        )
    fields = " and ".join(f"{field}: {str(value).lower()}" for field, value in changes.items())
    smaller = memory_estimate(config, with_changes(recipe, changes), on_gpu).total
    return f"With {fields} in the recipe it would take about {smaller / 2**30:.2f} GiB. Or free memory and run again."
