"""Base models of a Hugging Face hub: downloaded at a pinned commit, and compared with the hashes that the hub names."""

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft_dagster.base.model_folder import TOKENIZER_FILES, WEIGHT_FILES, BaseModelError, known_digest
from ft_dagster.config.recipe import Base

log = logging.getLogger(__name__)


def local_snapshot(base: Base, cache: Path) -> Path | None:
    """Return the folder of the pinned commit if it is on this machine. Downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(base.model, revision=base.revision, cache_dir=cache / "hub", local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def download(base: Base, cache: Path, token: str | None, weights: bool) -> Path:
    """Download the tokenizer, and the weights if asked for, and return the folder of the pinned commit.

    Files whose hash is not the one that the hub named are downloaded again.

    Raises:
        BaseModelError: the download failed, access was refused, or files are still damaged.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    place: dict[str, Any] = {"revision": base.revision, "cache_dir": cache / "hub", "token": token or False}
    damaged = None
    try:
        folder = Path(snapshot_download(base.model, allow_patterns=patterns, **place))
        for damaged in _damaged(folder, patterns):
            log.warning("%s is damaged: its hash is not the one that the hub gave. It is fetched again.", damaged)
            hf_hub_download(base.model, damaged.name, force_download=True, **place)
        damaged = None
    except GatedRepoError as error:
        raise BaseModelError(
            f"{base.model} is gated. Accept its terms on the hub, then put HUGGINGFACE_TOKEN into the workspace's .env."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"The hub shows no {base.model} at {base.revision}: no such repository or revision, or it is private and "
            "HUGGINGFACE_TOKEN is missing, expired or has no access."
        ) from error
    except Exception as error:  # the client does not wrap the errors of its transport, which share no class
        why = f"{damaged} is damaged, and " if damaged else ""
        raise BaseModelError(
            f"{why}{base.model} at {base.revision} cannot be downloaded: {type(error).__name__}. Check the connection, "
            "or use `base: {source: folder}` with a copy, or the recipe smollm2-135m, which needs no hub."
        ) from error
    if still := _damaged(folder, patterns):
        raise BaseModelError(
            f"{still[0]} is damaged: its hash is not the one that the hub gave, although it was fetched again. Look at "
            "the disk, and at what stands between here and the hub."
        )
    return folder


def _damaged(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a hub's snapshot whose bytes do not have the hash that the hub named.

    Each file of a snapshot is a link to a blob named after the hub's entity tag: the SHA-256 of a large file, git's
    SHA-1 of a small one (huggingface_hub, documentation of hf_hub_download). Some mirrors use the SHA-1 of the bytes,
    or a tag that is not a hash; such a file cannot be checked and counts as undamaged.
    """
    found = []
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()}):
        tag = path.readlink().name
        if re.fullmatch("[0-9a-f]{64}", tag):
            whole = known_digest(path) == tag
        elif re.fullmatch("[0-9a-f]{40}", tag):
            content = path.read_bytes()
            whole = tag in (_sha1(b"blob %d\0" % len(content), content), _sha1(content))
        else:
            whole = True
        if not whole:
            found.append(path)
    return found


def _sha1(*parts: bytes) -> str:
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()
