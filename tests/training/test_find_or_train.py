"""The adapter of a dataset is found in the store, also if an earlier version made it."""

from pathlib import Path
from typing import Any

import pytest

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.store.local import Artifact
from ft_dagster.training.find_or_train import keys_of, made_before
from ft_dagster.training.request import KIND

BASE = {"weights": "w"}


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> Recipe:
    return resolve_recipe(tiny_recipe)


def commit_adapter(dataset: Artifact, key: str, folder: Path, **about: Any) -> None:
    folder.mkdir()
    (folder / "file").write_text("weights")
    dataset.store.commit(KIND, key, folder, about)


@pytest.mark.parametrize(("change", "found"), [(0.5, True), (0.0, False)])
def test_an_adapter_of_an_earlier_version_is_reused_unless_it_changes_nothing(
    dataset: Path, recipe: Recipe, tmp_path: Path, change: float, found: bool
) -> None:
    artifact = Artifact.open(dataset)
    new, *earlier = keys_of(artifact, BASE, recipe)
    commit_adapter(artifact, earlier[-1], tmp_path / "adapter", largest_logit_change=change)
    adapter = made_before(artifact.store, artifact, BASE, recipe)
    assert (adapter is not None and adapter.key == earlier[-1]) == found
    commit_adapter(artifact, new, tmp_path / "newer", largest_logit_change=change)
    adapter = made_before(artifact.store, artifact, BASE, recipe)
    assert adapter and adapter.key == new


def test_a_damaged_dataset_of_an_earlier_version_is_passed_over(dataset: Path, recipe: Recipe) -> None:
    artifact = Artifact.open(dataset)
    broken = dataset.parent / "broken"
    broken.mkdir()
    (broken / "artifact.json").write_text("{")
    assert made_before(artifact.store, artifact, BASE, recipe) is None
