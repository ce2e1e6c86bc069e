"""Advice for runs that failed because a disk is full or cannot be written to: which disk, and what to do."""

import tempfile
from pathlib import Path

from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.runtime.disk import can_write, free_bytes, reports_full_disk, reports_read_only

_FULL_BYTES = 2**20
"""A disk with fewer free bytes is reported as full."""


def disk_advice(message: str) -> str | None:
    """Return what to do about an error that a full or read-only disk caused; None for any other error.

    Args:
        message: the error's text.
    """
    try:
        folders = _folders(load_settings())
    except SettingsError:  # reported by the code that needs the settings
        return None
    full = [f"{name} ({folder})" for name, folder in folders.items() if _is_full(folder)]
    if full or reports_full_disk(message):
        where = f"The disk that holds {', '.join(full)} is full." if full else "A disk is full."
        return f"{where} Make space and run again: finished work is kept."
    if reports_read_only(message):
        closed = [f"{name} ({folder})" for name, folder in folders.items() if not can_write(folder)]
        where = ", ".join(closed) or "A folder"
        return f"{where} cannot be written to. Mount it for writing, or name another folder in the settings."
    return None


def _is_full(folder: Path) -> bool:
    free = free_bytes(folder)
    return free is not None and free < _FULL_BYTES


def _folders(settings: Settings) -> dict[str, Path]:
    """Return the folders that a run writes to, by the name under which messages mention them."""
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
