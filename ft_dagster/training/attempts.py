"""Attempts at one adapter: each writes to its own folder, and resumes from the last checkpoint of earlier attempts.

A training that was given up may still be alive, for example on a machine that lost its network connection but still
reaches the shared disk. It continues to write to its own folder, where it can neither harm the next attempt nor be
mistaken for it.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ft_dagster.store.hashing import digest, file_digest
from ft_dagster.store.local import write_atomically
from ft_dagster.training.request import RESULT

log = logging.getLogger(__name__)
COMPLETE = "complete"
"""File in a checkpoint, written last. It maps each other file to its SHA-256, and its own name to that map's digest."""
_TURN, _IN_USE = ".turn", ".in_use"
"""Lock files: of all attempts' folder while one is chosen, and of an attempt while a run trains in it."""


def step_of(checkpoint: Path | str) -> int:
    """Return the optimizer step after which a checkpoint was saved, from its folder or the name of one of its files.

    >>> step_of(Path("attempt/checkpoint-20")), step_of("checkpoint-20/complete")
    (20, 20)
    """
    name = checkpoint.name if isinstance(checkpoint, Path) else checkpoint.partition("/")[0]
    return int(name.rpartition("-")[2])


@contextmanager
def attempt_in(folder: Path) -> Iterator[Path]:
    """Yield the attempt to train in: a finished one, or a new one with the last checkpoint of earlier attempts.

    Until the block is left, no other process on this machine removes the attempt. Other attempts that no process uses
    are removed, except the one that the checkpoint came from.

    Args:
        folder: the folder of all attempts at one adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with FileLock(folder / _TURN):
            attempt = finished_attempt(folder)
            if attempt is None:
                attempt = folder / uuid.uuid4().hex[:12]
                attempt.mkdir()
                held.enter_context(FileLock(attempt / _IN_USE))
                _inherit(attempt, [path for path in folder.iterdir() if path.is_dir() and path != attempt])
        yield attempt


def finished_attempt(folder: Path) -> Path | None:
    """Return the attempt that has made its adapter, which only needs to be committed to the store; None if none has."""
    return next((path.parent for path in folder.glob(f"*/{RESULT}")), None)


def _inherit(attempt: Path, before: Sequence[Path]) -> None:
    """Copy the last checkpoint of earlier attempts into a new one, and remove the other attempts if unused."""
    checkpoint = max((path for path in map(last_checkpoint, before) if path), key=step_of, default=None)
    if checkpoint:
        copy = attempt / f".{checkpoint.name}"
        shutil.copytree(checkpoint, copy)
        copy.rename(attempt / checkpoint.name)
    for other in before:
        if (checkpoint is None or other != checkpoint.parent) and not _is_in_use(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_in_use(attempt: Path) -> bool:
    try:
        with FileLock(attempt / _IN_USE, timeout=0):
            return False
    except (Timeout, OSError):  # locked, or on a disk without support for locks
        return True


def last_checkpoint(attempt: Path) -> Path | None:
    """Return the newest checkpoint of an attempt that is complete and undamaged, or None."""
    complete = sorted((path.parent for path in attempt.glob(f"checkpoint-*/{COMPLETE}")), key=step_of, reverse=True)
    return next(filter(_is_undamaged, complete), None)


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, once all other files are in it."""
    write_atomically(checkpoint / COMPLETE, completion(checkpoint_files(checkpoint)))


def checkpoint_files(checkpoint: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of a checkpoint's files, without the file that marks it as complete."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]
    return {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in paths}


def completion(files: Mapping[str, str]) -> bytes:
    """Return the content of the file that marks a checkpoint with these files as complete, with their digest."""
    return json.dumps({**files, COMPLETE: digest(dict(files))}).encode()


def completed_files(content: bytes) -> dict[str, str] | None:
    """Return the files that such a content names; None if it is damaged, or from a version that wrote no hashes.

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
