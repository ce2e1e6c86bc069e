"""Which layout of rows a base needs, known before its adapter's key is made. Imports no torch."""

import json
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from ft_dagster.base.model_folder import PreparedBase, model_config
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.dataset.packing import PACKED
from ft_dagster.store.hashing import digest
from ft_dagster.training.request import LayoutRequest

_CODE_VERSION = "1"
"""Increased by hand when trying the same base could give another layout."""
_KNOWN_PACKED = ("llama", "mistral")
"""Architectures that tests hold to be packed rightly, with the layers of transformers and with fused ones."""
Said = TypeVar("Said")


def known_layout(folder: Path, recipe: Recipe, cache: Path) -> str | None:
    """Return the layout of the base in a folder, or None if it has not been tried on this machine."""
    if model_config(folder).get("model_type") in _KNOWN_PACKED:
        return PACKED
    try:
        return str(json.loads(_remembered(folder, recipe, cache).read_bytes())["layout"])
    except (OSError, ValueError, KeyError):
        return None


def with_layout(
    base: PreparedBase, recipe: Recipe, settings: Settings, try_layout: Callable[[LayoutRequest, Path], Iterator[Said]]
) -> Generator[Said, None, PreparedBase]:
    """Return the base with its layout, which is tried in a process once for each machine and version of transformers.

    Args:
        base: the base model.
        recipe: the recipe with the number format of this machine.
        settings: say where it is remembered.
        try_layout: carries out a request, written to a path, in a process; it raises if the process fails.
    """
    folder = Path(base.folder)
    if (known := known_layout(folder, recipe, settings.cache)) is None:
        output = _remembered(folder, recipe, settings.cache)
        request = LayoutRequest(
            base=base.to_json(),
            recipe=recipe.model_dump(mode="json"),
            output=str(output),
            locks=str(settings.cache / "locks"),
        )
        yield from try_layout(request, output.with_name(f"{output.stem}.{uuid.uuid4().hex}.request"))
        known = str(json.loads(output.read_bytes())["layout"])
    return replace(base, layout=known)


def _remembered(folder: Path, recipe: Recipe, cache: Path) -> Path:
    name = digest([_CODE_VERSION, model_config(folder), recipe.training.attention, version("transformers")])
    return cache / "layouts" / f"{name[:32]}.json"
