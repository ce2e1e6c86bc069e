"""What tests of training share: a small dataset, and requests to train on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.base import prepare_base
from ft_dagster.recipe import resolve_recipe
from ft_dagster.store import Artifact
from ft_dagster.training.request import TrainingRequest, training_key


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], prose: Callable[[int, int], str]) -> Path:
    return make_dataset({f"chapter_{n}": prose(n, 9 + n) for n in range(6)}, held_out=["chapter_5"])


@pytest.fixture
def request_for(dataset: Path, tiny_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., TrainingRequest]:
    """Builds a request; keyword arguments change the recipe's parts."""

    def build(attempt: str = "attempt", **parts: dict[str, Any]) -> TrainingRequest:
        content = tiny_recipe | {name: tiny_recipe.get(name, {}) | fields for name, fields in parts.items()}
        recipe = resolve_recipe(content)
        base = prepare_base(recipe.base, tmp_path / "cache")
        version = Artifact.open(dataset).about["version"]
        return TrainingRequest(
            key=training_key(version, base.identity, recipe),
            base=base.to_json(),
            dataset=str(dataset),
            recipe=recipe.model_dump(mode="json"),
            attempt=str(tmp_path / attempt),
            logs=str(tmp_path / "logs"),
            offload=str(tmp_path / "offload"),
            locks=str(tmp_path / "locks"),
            speeds=str(tmp_path / "speeds"),
            lineage={"dataset": version},
        )

    return build
