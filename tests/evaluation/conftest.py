"""A fixture for tests of evaluation: an adapter trained on a few chapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import remember_machine

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train


@pytest.fixture
def trained(
    make_dataset: Callable[..., Path], prose: Callable[[int, int], str], tiny_recipe: dict[str, Any], tmp_path: Path
) -> Callable[..., TrainingRequest]:
    """Train an adapter in `<attempt>/adapter` and return the request; keyword arguments change recipe parts."""

    def make(**parts: dict[str, Any]) -> TrainingRequest:
        recipe = resolve_recipe(tiny_recipe | {name: tiny_recipe[name] | fields for name, fields in parts.items()})
        dataset = make_dataset({f"chapter_{n}": prose(n, 9) for n in range(4)}, held_out=["chapter_3"])
        request = TrainingRequest(
            key="adapter",
            base=prepare_base(recipe.base, tmp_path / "cache").to_json(),
            dataset=str(dataset),
            recipe=recipe.model_dump(mode="json"),
            attempt=str(tmp_path / "attempt"),
            logs=str(tmp_path / "logs"),
            locks=str(tmp_path / "locks"),
            cache=str(remember_machine(tmp_path / "cache")),
        )
        train(request, lambda _: None)
        return request

    return make
