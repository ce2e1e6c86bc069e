"""What a training process is asked to do, as one JSON file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ft_dagster.base.prepare import PreparedBase
from ft_dagster.config.recipe import Lora, Recipe, resolve_recipe
from ft_dagster.model.manifest import differences, read_manifest
from ft_dagster.runtime.request import Request
from ft_dagster.store.hashing import digest

KIND = "lora_adapter"
"""What the store calls an adapter."""
CODE_VERSION = "2"
"""Raised by hand when the same request would give other weights."""
RESULT = "result.json"
"""Written last into an attempt's folder: without it the attempt is not finished."""
WEIGHTS = "adapter_model.safetensors"
"""The adapter's weights, as peft names them."""
PROGRESS = "progress.json"
"""Replaced at every step while training runs."""


def training_key(dataset_version: str, base: dict[str, str], recipe: Recipe) -> str:
    """The key of an adapter: everything that decides its weights, and nothing else.

    With `base.dtype: auto` that is `auto`, whatever a machine makes of it: machines that share a store train once.
    """
    return digest(
        {
            "dataset": dataset_version,
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


def training_keys(dataset_version: str, base: dict[str, str], recipe: Recipe) -> list[str]:
    """The key that a new adapter gets, and then those of other adapters that serve as well (`Recipe.readings`)."""
    return [training_key(dataset_version, base, reading) for reading in recipe.readings]


def adapter_key(made_for: str, start: Path | None) -> str:
    """The key of an adapter for a training key, that goes on from another adapter or from none."""
    return digest([made_for, read_manifest(start).key]) if start else made_for


def adapter_to_go_on_from(
    recipe: Recipe, in_use: Path | None, base: PreparedBase, sections: Collection[str]
) -> Path | None:
    """The folder of the adapter in use, if training is to begin with its weights; None for fresh ones.

    It begins with fresh ones where the recipe says so, where the adapter in use is of another base or shape, and
    where it has learned from all of the sections already, so that there is nothing new to go on with.

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
    except ValidationError:  # by a field that an earlier version had, or a later one has
        return False


@dataclass(frozen=True)
class ModelRequest(Request):
    """Something to do with a base model, by a recipe."""

    base: dict[str, str]
    """A PreparedBase."""
    recipe: dict[str, Any]
    """A resolved recipe."""

    def prepared_base(self) -> PreparedBase:
        return PreparedBase(**self.base)

    def resolved_recipe(self) -> Recipe:
        return resolve_recipe(self.recipe)


@dataclass(frozen=True)
class TrainingRequest(ModelRequest):
    """One adapter to make."""

    key: str
    dataset: str
    """Folder of the dataset's artifact."""
    attempt: str
    """Folder for checkpoints and results, with the last checkpoint of the attempt before it to go on from."""
    logs: str
    """Folder for TensorBoard files."""
    locks: str
    """Folder for the lock that keeps one training a device."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """What the adapter's manifest says of its data: dataset version, chapters and sections with hashes."""
    start: str | None = None
    """Folder of the adapter to go on from, with its manifest; None for a fresh one."""
    threads: int | None = None
    told_seconds: float | None = None
    """How long it was said that training takes; None where nothing was said."""
    cache: str | None = None
    """FT_CACHE, where it is kept how fast this machine is in each number format; None where it is measured anew."""
    speeds: str | None = None
    """Folder where it is remembered what trainings took; None where it is not."""
    run: str | None = None
    """Id of the run that trains; it is in the file that tells how far training is."""
    checkpoints: str | None = None
    """URL in a bucket where checkpoints are kept for other machines; None where they stay on this one."""
