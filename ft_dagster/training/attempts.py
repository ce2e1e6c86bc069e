"""Attempts at one adapter: each writes to a folder of its own, and goes on from the best of those before it.

A training that was given up may be alive: on a machine behind a cut link that still reaches the shared disk. It writes
on in its own folder, where it can neither harm the attempt after it nor be taken for it.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from ft_dagster.hashing import digest, file_digest
from ft_dagster.store import write_atomically
from ft_dagster.training.request import RESULT

log = logging.getLogger(__name__)
COMPLETE = "complete"
"""File in a checkpoint, written when it is whole: the hashes of its other files, and under its own name theirs."""


def next_attempt(folder: Path) -> Path:
    """The folder to train in: of an attempt that has ended, or a new one with the last checkpoint of those before it.

    Args:
        folder: of all attempts at one adapter.
    """
    before = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    for attempt in before:
        if (attempt / RESULT).exists():
            return attempt
    attempt = folder / uuid.uuid4().hex[:12]
    attempt.mkdir(parents=True)
    checkpoint = max((path for path in map(last_checkpoint, before) if path), key=_step, default=None)
    if checkpoint:
        copy = attempt / f".{checkpoint.name}"
        shutil.copytree(checkpoint, copy)
        copy.rename(attempt / checkpoint.name)
    for other in before:
        if checkpoint is None or other != checkpoint.parent:
            shutil.rmtree(other, ignore_errors=True)
    return attempt


def last_checkpoint(attempt: Path) -> Path | None:
    """The newest checkpoint of an attempt that is whole and whose bytes are those that were saved."""
    whole = sorted((path.parent for path in attempt.glob(f"checkpoint-*/{COMPLETE}")), key=_step, reverse=True)
    return next(filter(_is_undamaged, whole), None)


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, once all else is in it."""
    write_atomically(checkpoint / COMPLETE, completion(checkpoint_files(checkpoint)))


def checkpoint_files(checkpoint: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of a checkpoint's files, without the one that says that it is whole."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]
    return {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in paths}


def completion(files: Mapping[str, str]) -> bytes:
    """What says that a checkpoint of these files is whole. Its own hash is in it."""
    return json.dumps({**files, COMPLETE: digest(dict(files))}).encode()


def completed_files(content: bytes) -> dict[str, str] | None:
    """The files that it names; None where it is damaged, or of a version that wrote no hashes.

    >>> completed_files(completion({"weights": "ab"}))
    {'weights': 'ab'}
    """
    try:
        files = json.loads(content)
        return files if files.pop(COMPLETE) == digest(files) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_undamaged(checkpoint: Path) -> bool:
    try:
        files = completed_files((checkpoint / COMPLETE).read_bytes())
    except FileNotFoundError:  # another process of this training has just removed it
        return False
    damaged = [COMPLETE] if files is None else [n for n, sha256 in files.items() if not _has(checkpoint / n, sha256)]
    for name in damaged:
        log.warning(
            "%s is damaged or missing: its hash is not the one recorded. An older checkpoint, or none, is used.",
            checkpoint / name,
        )
    return not damaged


def _has(path: Path, sha256: str) -> bool:
    try:
        return file_digest(path) == sha256
    except OSError:
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
