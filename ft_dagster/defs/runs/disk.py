"""Disks that are full, or cannot be written to: which, and what to do."""

import shutil
import tempfile
from pathlib import Path

from ft_dagster.config.settings import Settings, SettingsError, load_settings

_FULL = ("no space left on device", "disk quota exceeded", "database or disk is full", "[errno 28]", "[errno 122]")
_READ_ONLY = ("read-only file system", "attempt to write a readonly database", "[errno 30]")
"""Libraries wrap the system's error in classes of their own, so that its words are all there is to tell it by."""
_LITTLE = 2**20
"""Bytes: with less than that free a disk is named."""


def disk_advice(said: str) -> str | None:
    """What to do about an error that says that a disk is full or cannot be written to; None for any other.

    Args:
        said: its text.
    """
    text = said.lower()
    try:
        folders = _folders(load_settings())
    except SettingsError:  # which is said by itself
        return None
    full = [f"{name} ({folder})" for name, folder in folders.items() if _free(folder) < _LITTLE]
    if full or any(part in text for part in _FULL):
        where = f"The disk that holds {', '.join(full)} is full." if full else "A disk is full."
        return f"{where} Make space and run again: it goes on with what was finished."
    if any(part in text for part in _READ_ONLY):
        closed = [f"{name} ({folder})" for name, folder in folders.items() if not _can_write(folder)]
        where = ", ".join(closed) or "A folder"
        return f"{where} cannot be written to. Mount it for writing, or name another folder in the settings."
    return None


def _folders(settings: Settings) -> dict[str, Path]:
    """What a run writes to."""
    store = {} if "://" in settings.store else {"FT_STORE": settings.store_root}
    return {
        **store,
        "the workspace": settings.workspace,
        "the state of the workspace": settings.state,
        "attempts at training": settings.state / "attempts",
        "the logs": settings.logs,
        "DAGSTER_HOME": settings.dagster_home,
        "FT_CACHE": settings.cache,
        "temporary files": Path(tempfile.gettempdir()),
    }


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _free(folder: Path) -> int:
    """Bytes; unknown counts as enough."""
    try:
        return shutil.disk_usage(_there(folder)).free
    except OSError:
        return _LITTLE


def _can_write(folder: Path) -> bool:
    """Asked of the disk: to root every folder looks writable."""
    try:
        with tempfile.TemporaryFile(dir=_there(folder)):
            return True
    except OSError:
        return False
