"""The number of optimizer steps of a training, and advice where it is too small to learn from."""

import math

from ft_dagster.config.recipe import Recipe

FEW_STEPS = 20
"""With fewer steps, most of them are in the warm-up or at the end of the decay, where the learning rate is low."""


def optimizer_steps(rows: int, recipe: Recipe) -> int:
    """Return the number of optimizer steps. As in transformers' Trainer, an incomplete last batch counts as a step.

    Args:
        rows: the number of packed rows on the train side.
        recipe: the resolved recipe.
    """
    return math.ceil(recipe.training.epochs * _steps_per_epoch(rows, recipe))


def few_steps_advice(rows: int, recipe: Recipe) -> str | None:
    """Return what to change if the training has fewer than FEW_STEPS steps, otherwise None."""
    steps = optimizer_steps(rows, recipe)
    if steps >= FEW_STEPS:
        return None
    epochs = math.ceil(FEW_STEPS / _steps_per_epoch(rows, recipe))
    return (
        f"{steps} optimizer step(s) are too few to learn much from. For about {FEW_STEPS}, set training.epochs: "
        f"{epochs} in the recipe, or add text."
    )


def _steps_per_epoch(rows: int, recipe: Recipe) -> int:
    options = recipe.training
    batches = math.ceil(rows / options.rows_per_device)
    return max(1, math.ceil(batches / (options.rows_per_step // options.rows_per_device)))
