"""Attempts at one adapter: each writes to a folder of its own, and goes on from the best of those before it.

A training that was given up may be alive: on a machine behind a cut link that still reaches the shared disk. It writes
on in its own folder, where it can neither harm the attempt after it nor be taken for it.
"""

import shutil
import uuid
from pathlib import Path

from ft_dagster.training.request import RESULT

COMPLETE = "complete"
"""File in a checkpoint, written when it is whole."""


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
    """The newest whole checkpoint of an attempt."""
    return max((path.parent for path in attempt.glob(f"checkpoint-*/{COMPLETE}")), key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
