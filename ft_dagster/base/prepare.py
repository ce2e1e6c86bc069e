"""The pretrained model that a recipe names: its data version, and its files in a plain folder. Imports no torch."""

import logging
from collections.abc import Callable
from pathlib import Path

from ft_dagster.base.embedded import embedded_model, local_embedded, prepare_embedded
from ft_dagster.base.hub import download, local_snapshot
from ft_dagster.base.model_folder import (
    TOKENIZER_FILES,
    WEIGHT_FILES,
    BaseModelError,
    PreparedBase,
    describe_base,
    known_digest,
    refuse_pickles,
    weights_hash,
)
from ft_dagster.config.recipe import Base
from ft_dagster.store.hashing import digest

log = logging.getLogger(__name__)


def base_version(base: Base) -> str:
    """Return the data version of the base model that a recipe names, without downloading or converting it."""
    if base.source == "embedded":
        return embedded_model(base.model).sha256
    if base.source == "hub":
        return f"{base.model}@{base.revision}"
    folder = Path(base.model).expanduser()
    files = [path for pattern in (*WEIGHT_FILES, *TOKENIZER_FILES) for path in sorted(folder.glob(pattern))]
    refuse_pickles(folder)
    if not files:
        raise BaseModelError(f"base.model: {folder} holds no model (config.json, tokenizer.json, model*.safetensors).")
    return digest([[path.name, known_digest(path)] for path in files])


def prepare_base(
    base: Base,
    cache: Path,
    *,
    token: str | None = None,
    weights: bool = True,
    say: Callable[[str], None] = log.info,
) -> PreparedBase:
    """Make sure that the base model is in a plain folder on this machine, and describe it.

    Args:
        base: the part `base` of the recipe.
        cache: the folder that contains prepared models.
        token: for gated repositories of a hub.
        weights: if False, only the tokenizer is fetched from a hub, which is all that the light stages need.
        say: called before each long step of preparing an embedded model, with what is done.

    Raises:
        BaseModelError: it cannot be downloaded, or its bytes are not the pinned ones.
    """
    if base.source == "embedded":
        return prepare_embedded(base.model, cache, say)
    if base.source == "hub":
        folder = download(base, cache, token, weights)
        return describe_base(f"{base.model}@{base.revision}", folder, weights)
    base_version(base)
    folder = Path(base.model).expanduser()
    return describe_base(folder.name, folder, weights)


def local_base(base: Base, cache: Path) -> PreparedBase | None:
    """Describe the base model if it is on this machine, without hashing weights; otherwise return None.

    Nothing is downloaded, converted or written.
    """
    if base.source == "embedded":
        return local_embedded(base.model, cache)
    if base.source == "folder":
        return describe_base(Path(base.model).name, Path(base.model).expanduser(), weights=False)
    folder = local_snapshot(base, cache)
    try:
        return describe_base(f"{base.model}@{base.revision}", folder, weights=False) if folder else None
    except BaseModelError:
        return None


def verify_base(base: PreparedBase) -> None:
    """Raise BaseModelError if the weights in the folder no longer have the hash of the prepared base."""
    found = weights_hash(Path(base.folder))
    if found != base.weights:
        raise BaseModelError(
            f"The weights in {base.folder} have changed since they were prepared (hash {found[:12]}, expected "
            f"{base.weights[:12]}). Delete that folder; it is made again at the next run."
        )
