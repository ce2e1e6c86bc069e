"""Disk space and write permission, and how libraries report that one of them is missing.

Libraries wrap the system's error in classes of their own, so only the words of an error show what it is about.
"""

import shutil
import tempfile
from pathlib import Path

_FULL = (
    *("no space left on device", "disk quota exceeded", "[errno 28]", "[errno 122]"),
    "database or disk is full",  # SQLite
    *("pytorchstreamwriter failed writing", "unexpected pos"),  # torch
)
_READ_ONLY = ("read-only file system", "attempt to write a readonly database", "[errno 30]")


def reports_full_disk(message: str) -> bool:
    """Whether an error's message says that a disk is full."""
    return any(words in message.lower() for words in _FULL)


def reports_read_only(message: str) -> bool:
    """Whether an error's message says that a folder cannot be written to."""
    return any(words in message.lower() for words in _READ_ONLY)


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes on the disk of a folder, which need not exist yet; None if they cannot be read."""
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def can_write(folder: Path) -> bool:
    """Whether a file can be created in a folder, or in the nearest parent that exists.

    A file is created to find out: for root, the permissions of every folder allow it, also on a read-only disk.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
