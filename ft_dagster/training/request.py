"""The request to a training process, one JSON file, and the key of the adapter that it makes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.config.recipe import Lora, Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.model.manifest import differences, read_manifest
from ft_dagster.runtime.request import Request
from ft_dagster.store.hashing import digest

KIND = "lora_adapter"
"""The kind of artifact that an adapter is in the store."""
CODE_VERSION = "2"
"""Raised by hand when the same request would produce different weights."""
RESULT = "result.json"
"""File that is written last into an attempt's folder: without it the attempt is not finished."""
WEIGHTS = "adapter_model.safetensors"
"""File of the adapter's weights, as peft names it."""
PROGRESS = "progress.json"
"""File in an attempt's folder with the progress of the training, replaced at every step."""


def training_key(text_version: str, base: dict[str, str], recipe: Recipe) -> str:
    """Return the training key of an adapter: a hash of everything that determines its weights, and nothing else.

    `base.dtype: auto` enters the key as `auto`, whatever it resolves to: machines that share a store train once.

    Args:
        text_version: the version of the text that determines the weights, see `training_keys`.
        base: the identity of the base model.
        recipe: the resolved recipe.
    """
    return digest(
        {
            "dataset": text_version,
            "base": base,
            "recipe": {
                "base": recipe.base.for_keys(include=("quantization", "dtype")),
                "objectives": recipe.objectives.for_keys(),
                "lora": recipe.lora.for_keys(),
                "training": recipe.training.for_keys(exclude=("save_every",)),
            },
            "code": CODE_VERSION,
        }
    )


def training_keys(train_version: str, version: str, base: dict[str, str], recipe: Recipe) -> list[str]:
    """Return the training key of a new adapter, followed by those of equivalent adapters.

    The held-out side of a dataset determines weights only if it is measured during training and the best weights are
    kept (`training.evaluate_every`). Earlier versions always counted it. Equivalent recipes are `Recipe.readings`.

    Args:
        train_version: the version of the dataset's train side.
        version: the version of the dataset.
        base: the identity of the base model.
        recipe: the resolved recipe.
    """
    texts = [version] if recipe.training.evaluate_every else [train_version, version]
    return list(dict.fromkeys(training_key(text, base, reading) for text in texts for reading in recipe.readings))


def adapter_key(made_for: str, start: Path | None) -> str:
    """Return the key of an adapter, from its training key and the adapter that training starts from, if any."""
    return digest([made_for, read_manifest(start).key]) if start else made_for


def adapter_to_go_on_from(
    recipe: Recipe, in_use: Path | None, base: PreparedBase, sections: Collection[str]
) -> Path | None:
    """Return the folder of the adapter in use if training should start from its weights, or None for new weights.

    Training starts from new weights if the recipe says so, if the adapter in use has another base or shape, and if that
    adapter has already learned from all of the sections, so that there is nothing new to train on.

    Raises:
        AdapterError: the manifest of the adapter in use is missing or damaged.
    """
    if recipe.training.start == "base" or in_use is None:
        return None
    manifest = read_manifest(in_use)
    known = {item["section"] for item in manifest.trained_on}
    fits = not differences(manifest, base) and _has_shape(manifest.recipe["lora"], recipe.lora)
    return in_use if fits and set(sections) - known else None


def _has_shape(made_by: Mapping[str, Any], lora: Lora) -> bool:
    try:
        return Lora.model_validate(made_by) == lora
    except ValidationError:  # it has a field of an earlier or a later version
        return False


@dataclass(frozen=True)
class ModelRequest(Request):
    """A request that needs a base model and a recipe."""

    base: dict[str, str]
    """The PreparedBase as JSON."""
    recipe: dict[str, Any]
    """The resolved recipe as JSON."""

    def prepared_base(self) -> PreparedBase:
        return PreparedBase(**self.base)

    def resolved_recipe(self) -> Recipe:
        return resolve_recipe(self.recipe)


@dataclass(frozen=True)
class LayoutRequest(ModelRequest):
    """A request to try whether pieces of packed rows see each other in a base."""

    output: str
    """File for the result."""
    locks: str
    """Folder of the locks that lease each device to one process at a time."""


@dataclass(frozen=True)
class TrainingRequest(ModelRequest):
    """A request to make one adapter."""

    key: str
    dataset: str
    """Folder of the dataset's artifact."""
    attempt: str
    """Folder for checkpoints and results, which contains the last checkpoint of the attempt before, to resume from."""
    logs: str
    """Folder for TensorBoard files."""
    locks: str
    """Folder of the locks that lease each device to one process at a time."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """The part of the adapter's manifest about its data: dataset version, chapters and sections with hashes."""
    start: str | None = None
    """Folder of the adapter to start from, with its manifest; None for new weights."""
    threads: int | None = None
    expected_seconds: float | None = None
    """The duration that was estimated before the training; None if there is no estimate."""
    cache: str | None = None
    """FT_CACHE, where this machine's speed in each number format is saved; None to measure it again."""
    speeds: str | None = None
    """Folder where speed and memory of trainings are saved; None to save nothing."""
    run: str | None = None
    """Id of the run that trains, which progress.json contains."""
    checkpoints: str | None = None
    """URL in a bucket where checkpoints are shared with other machines; None to keep them on this one."""
