"""What an adapter is bound to and was made from: `manifest.json` in its folder. Imports no torch."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ft_dagster import __version__
from ft_dagster.base.prepare import PreparedBase, base_version, prepare_base
from ft_dagster.config.recipe import Base, Recipe, recipe_of_adapter
from ft_dagster.config.settings import Settings
from ft_dagster.errors import UserError
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Artifact, write_atomically

MANIFEST = "manifest.json"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")
_BOUND_TO = {"weights": "other weights", "tokenizer": "another tokenizer", "template": "another chat template"}


class AdapterError(UserError):
    """An adapter that cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """Everything an adapter is bound to and was made from."""

    key: str
    """Hash of what decides the weights."""
    base: Mapping[str, str]
    """`name`, and the hashes of its `weights`, `tokenizer` and chat `template`: a PreparedBase without its folder."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    code: str
    """Version of the training code: another one gives other weights."""
    libraries: Mapping[str, str]
    """Name -> version, Python itself included."""
    revision: str = ""
    """Of the base: the commit on a hub, the SHA-256 of the embedded file, the hash of a folder's files."""
    package: str = ""
    """Version of ft_dagster."""
    step: int = 0
    """Optimizer step whose weights these are."""
    number_format: str = ""
    """What matrix products were computed in: what the recipe names, or what `auto` was on the machine that trained."""
    started_from: str = ""
    """Key of the adapter whose weights training began with; empty where it began with fresh ones."""
    dataset: str = ""
    """Version of the tokenized dataset."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """Stage -> key of its artifact in the store."""
    chapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Chapter -> file -> SHA-256 of its bytes; held-out chapters included."""
    held_out: Sequence[str] = ()
    """Chapters or sections that were kept for evaluation."""
    trained_on: Sequence[Mapping[str, str]] = ()
    """`chapter`, `title`, `source` file and hash of each `section` that was trained on."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of the other files in the adapter's folder."""

    def write(self, folder: Path) -> None:
        """Write it into the adapter's folder."""
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
    """Say in an adapter's folder, once everything else is in it, what it is bound to and was made from.

    Args:
        folder: holds the adapter's other files, which are hashed.
        key: the adapter's.
        base: what it was trained on.
        recipe: the resolved recipe.
        code: version of the training code.
        step: the optimizer step that was kept.
        lineage: `number_format`, `started_from`, `dataset`, `made_from`, `chapters`, `held_out`, `trained_on`, as far
            as they are known.
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
    """The manifest of the adapter in a folder.

    Raises:
        AdapterError: there is none, or it is damaged.
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
            f"{path} is damaged ({error}). Take the adapter from the store or release it anew."
        ) from error


def stored_manifest(adapter: Artifact) -> Manifest:
    """The manifest of an adapter of the store, whose weights need not be here. Raises StoreError if it is damaged."""
    return _manifest(adapter.read_json(MANIFEST))


def _manifest(content: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(**{item.name: content[item.name] for item in fields(Manifest) if item.name in content})
    if missing := [name for name in _BOUND_TO if not isinstance(manifest.base.get(name), str)]:
        raise ValueError(f"base has no {' and no '.join(missing)}")
    return manifest


def made_on(manifest: Manifest, settings: Settings) -> tuple[Recipe, PreparedBase]:
    """The recipe that an adapter was made by, and its base, brought here. Raises BaseModelError if it cannot be had."""
    recipe = recipe_of_adapter(manifest.recipe)
    return recipe, prepare_base(recipe.base, settings.cache, token=settings.token)


def differences(manifest: Manifest, base: PreparedBase) -> list[str]:
    """What keeps an adapter from a base model, each as a phrase; empty where it fits. Names do not count."""
    return [
        f"{phrase} ({manifest.base[name][:12]}, not {found[:12] or 'known'})"
        for name, phrase in _BOUND_TO.items()
        if manifest.base[name] != (found := base.identity[name])
    ]


def check_adapter(folder: Path, base: PreparedBase) -> Manifest:
    """The manifest of an adapter that fits a base model and whose files are whole.

    Raises:
        AdapterError: it was trained on another base, tokenizer or chat template; a file is missing or not what was
            saved; or there is no manifest.
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
    """Raise AdapterError if a file of an adapter is missing or not what was saved."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise AdapterError(f"{path} is missing. Take the adapter from the store or release it anew.")
        if file_digest(path) != expected:
            raise AdapterError(
                f"{path} is not the file that was saved. Take the adapter from the store or release it anew."
            )
