"""Which changes of a recipe make which stages stale."""

from typing import Any

import pytest

from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.defs.stages import STAGES


def changed(tiny_recipe: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return the stages that another choice of objectives makes stale."""
    one, other = (resolve_recipe(tiny_recipe | {"objectives": objectives}) for objectives in (before, after))
    return [stage.name for stage in STAGES if stage.recipe_hash(one) != stage.recipe_hash(other)]


@pytest.mark.parametrize(
    ("before", "after", "stages"),
    [
        ({"rewrite": 0.5}, {"rewrite": 0.25}, ["lora_adapter"]),
        ({}, {"rewrite": 0.5}, ["tokenized_dataset", "lora_adapter"]),
        ({"rewrite": 1.0}, {"text": 0.0, "rewrite": 1.0}, ["tokenized_dataset", "lora_adapter"]),
    ],
)
def test_weights_of_objectives_affect_training_and_their_choice_also_the_dataset(
    tiny_recipe: dict[str, Any], before: dict[str, float], after: dict[str, float], stages: list[str]
) -> None:
    assert changed(tiny_recipe, before, after) == stages
