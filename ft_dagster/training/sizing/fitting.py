"""Whether a training fits into memory, and what to change in its recipe so that it does. Imports no torch."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_dagster.config.recipe import Recipe, resolve_recipe
from ft_dagster.training.sizing.estimate import MemoryEstimate, memory_estimate

MARGIN = 1.25
"""A training is refused when its estimate exceeds this many times the memory that is there. The estimate was at most
17 % above published and measured figures (docs/memory.md); to refuse what would fit is worse than to fail late."""


@dataclass(frozen=True)
class Fit:
    """What a training takes, beside the memory that is available."""

    estimate: MemoryEstimate
    available: int
    """Bytes for each process that trains."""
    advice: str
    """What to change; empty where the training fits."""

    @property
    def is_refused(self) -> bool:
        """Whether it would be in vain to try."""
        return self.estimate.total > MARGIN * self.available


def fit(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> Fit:
    """Compare what a training takes with so many bytes of memory.

    Args:
        config: the base's config.json.
        recipe: what to train.
        on_gpu: whose memory it is, a GPU's or the machine's.
        available: bytes for each process that trains.

    Raises:
        UnknownModelError: the formula does not know the model.
    """
    estimate = memory_estimate(config, recipe, on_gpu)
    return Fit(estimate, available, "" if estimate.total <= available else advice(config, recipe, on_gpu, available))


def changes_that_fit(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> dict[str, Any]:
    """Fields of the recipe and the values with which a training fits into so many bytes; empty if none are found.

    Every combination is put through the formula. What leaves the adapter as it is comes first (attention,
    checkpointing, rows at a time, the largest that fit), then 4-bit weights, then shorter blocks.
    """
    training, length = recipe.training, recipe.tokens.block_length
    rows = [n for n in range(training.rows_per_device - 1, 0, -1) if training.rows_per_step % n == 0]
    choices: list[tuple[str, int, list[Any]]] = [  # field, how much it is to ask, values
        ("training.attention", 1, ["sdpa"] if training.attention != "sdpa" else []),
        ("training.gradient_checkpointing", 1, [] if training.gradient_checkpointing else [True]),
        ("training.rows_per_device", 1, rows),
        ("base.quantization", 4, [] if recipe.base.quantization == "nf4" else ["nf4"]),
        ("tokens.block_length", 8, [length // n for n in (2, 4, 8) if length // n >= 128]),
    ]
    asks = {field: ask for field, ask, _ in choices}
    combinations = [
        {field: value for field, value in zip(asks, values, strict=True) if value is not None}
        for values in itertools.product(*([None, *values] for _, _, values in choices))
    ]
    for changes in sorted(combinations, key=lambda changes: sum(asks[field] for field in changes)):
        if memory_estimate(config, with_changes(recipe, changes), on_gpu).total <= available:
            return changes
    return {}


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in some fields, named as `training.rows_per_device`."""
    content = recipe.model_dump(mode="json")
    for field, value in changes.items():
        part, _, name = field.partition(".")
        content[part][name] = value
    return resolve_recipe(content)


def advice(config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, available: int) -> str:
    """What to change, in a sentence or two, where a training does not fit into so many bytes."""
    changes = changes_that_fit(config, recipe, on_gpu, available)
    if not changes:
        return (
            "Neither training.gradient_checkpointing, training.rows_per_device, base.quantization nor "
            "tokens.block_length makes it fit: choose a smaller base, or free memory."
        )
    fields = " and ".join(f"{field}: {str(value).lower()}" for field, value in changes.items())
    smaller = memory_estimate(config, with_changes(recipe, changes), on_gpu).total
    return f"With {fields} in the recipe it would take about {smaller / 2**30:.2f} GiB. Or free memory and run again."
