"""The manifest of an adapter, `manifest.json`: its base model, and what it was made from. Imports no torch."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ft_dagster import __version__
from ft_dagster.base.model_folder import BaseModelError, PreparedBase
from ft_dagster.base.prepare import base_version, prepare_base
from ft_dagster.config.recipe import Base, Recipe
from ft_dagster.config.recipe_file import load_recipe, recipe_of_adapter
from ft_dagster.config.settings import Settings
from ft_dagster.errors import UserError
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Artifact, write_atomically

MANIFEST = "manifest.json"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")
_BOUND_TO = {"weights": "other weights", "tokenizer": "another tokenizer", "template": "another chat template"}


class AdapterError(UserError):
    """An adapter cannot be used here; the message says why, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The base model that an adapter belongs to, and everything that it was made from."""

    key: str
    """Hash of everything that determines the weights."""
    base: Mapping[str, str]
    """The base's `name` and hashes of its `weights`, `tokenizer` and chat `template`: a PreparedBase without folder."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    code: str
    """Version of the training code: a different one may produce different weights."""
    libraries: Mapping[str, str]
    """Name -> version of each library, including Python."""
    revision: str = ""
    """Revision of the base: the commit on a hub, the SHA-256 of the embedded file, or the hash of a folder's files."""
    package: str = ""
    """Version of ft_dagster."""
    step: int = 0
    """The optimizer step after which these weights were kept."""
    number_format: str = ""
    """Number format of matrix products: the recipe's, or what `auto` resolved to on the machine that trained."""
    started_from: str = ""
    """Key of the adapter whose weights training started from; empty if it started from new ones."""
    refit_of: str = ""
    """Key of the adapter that was measured in the place of this one, which was trained on the same text and on the
    held-out text; empty if this adapter was measured itself."""
    dataset: str = ""
    """Data version of the tokenized dataset."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """Stage -> key of its artifact in the store."""
    chapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Chapter -> file -> SHA-256 of its bytes, including held-out chapters."""
    held_out: Sequence[str] = ()
    """Chapters or sections that were held out for evaluation."""
    trained_on: Sequence[Mapping[str, str]] = ()
    """For each section that was trained on, its `chapter`, `title`, `source` file and hash (`section`)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of each other file in the adapter's folder."""

    def write(self, folder: Path) -> None:
        """Write the manifest into the adapter's folder."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True))


def write_manifest(
    folder: Path,
    key: str,
    base: PreparedBase,
    recipe: Mapping[str, Any],
    code: str,
    step: int,
    lineage: Mapping[str, Any],
) -> Manifest:
    """Write the manifest into an adapter's folder, once all other files are in it.

    Args:
        folder: the adapter's folder; its other files are hashed.
        key: the adapter's key.
        base: the base model that it was trained on.
        recipe: the resolved recipe.
        code: the version of the training code.
        step: the optimizer step after which the weights were kept.
        lineage: `number_format`, `started_from`, `refit_of`, `dataset`, `made_from`, `chapters`, `held_out`,
            `trained_on`, as far as they are known.
    """
    wanted = Base.model_validate(recipe["base"])
    manifest = Manifest(
        key=key,
        base=base.identity,
        recipe=recipe,
        code=code,
        libraries={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        revision=wanted.revision or base_version(wanted),
        package=__version__,
        step=step,
        files={path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
        **lineage,
    )
    manifest.write(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the adapter in a folder.

    Raises:
        AdapterError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return _manifest(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} has no {MANIFEST}, so nothing says which base model it belongs to. Use an adapter that "
            "ft_dagster made, in a folder with all its files."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path} is damaged ({error}). Take the adapter from the store or release it again."
        ) from error


def stored_manifest(adapter: Artifact) -> Manifest:
    """Read the manifest of an adapter in the store without fetching its weights. Raises StoreError if it is damaged."""
    return _manifest(adapter.read_json(MANIFEST))


def _manifest(content: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(**{item.name: content[item.name] for item in fields(Manifest) if item.name in content})
    if missing := [name for name in _BOUND_TO if not isinstance(manifest.base.get(name), str)]:
        raise ValueError(f"base has no {' and no '.join(missing)}")
    return manifest


def made_on(manifest: Manifest, settings: Settings) -> tuple[Recipe, PreparedBase]:
    """Return the recipe of an adapter, and its base, fetched if needed.

    The manifest contains the absolute path of a base in a folder. After a move, the base that the recipe of the
    workspace names is used, if the adapter fits it.

    Raises:
        BaseModelError: the base is not on this machine, and cannot be fetched.
    """
    recipe = recipe_of_adapter(manifest.recipe)
    try:
        return recipe, prepare_base(recipe.base, settings.cache, token=settings.token)
    except BaseModelError:
        base = _base_of_workspace(settings) if recipe.base.source == "folder" else None
        if base is None or differences(manifest, base):
            raise
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": base.folder})}), base


def _base_of_workspace(settings: Settings) -> PreparedBase | None:
    try:
        base = load_recipe(settings.recipe, settings.workspace).base
        return prepare_base(base, settings.cache, token=settings.token)
    except UserError:
        return None


def differences(manifest: Manifest, base: PreparedBase) -> list[str]:
    """Return how a base model differs from the adapter's, as phrases; empty if the adapter fits. Names are ignored."""
    return [
        f"{phrase} ({manifest.base[name][:12]}, not {found[:12] or 'known'})"
        for name, phrase in _BOUND_TO.items()
        if manifest.base[name] != (found := base.identity[name])
    ]


def check_adapter(folder: Path, base: PreparedBase) -> Manifest:
    """Check that an adapter fits a base model and that its files are undamaged, and return its manifest.

    Raises:
        AdapterError: the adapter was trained on another base, tokenizer or chat template; one of its files is missing
            or differs from the one that was saved; or it has no manifest.
    """
    manifest = read_manifest(folder)
    if found := differences(manifest, base):
        raise AdapterError(
            f"The adapter in {folder} was trained on {manifest.base.get('name')}, which has {', '.join(found)} than "
            f"{base.name}. Load it on the base model it was trained on, or train one for this base."
        )
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise AdapterError if a file of an adapter is missing or differs from the one that was saved."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise AdapterError(f"{path} is missing. Take the adapter from the store or release it again.")
        if file_digest(path) != expected:
            raise AdapterError(
                f"{path} is not the file that was saved. Take the adapter from the store or release it again."
            )
