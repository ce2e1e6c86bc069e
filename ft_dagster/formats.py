"""The number of the format in which a folder, or a bucket, was written; one of a newer ft_dagster is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from ft_dagster.store import StoreError, write_atomically

NAME = "ft_dagster-format"
"""File, or object, that holds the number."""
STORE, STATE, HOME = 1, 1, 1
"""What this version writes: the store (of a folder, or below a bucket's prefix), `.ft/` of a workspace, and what
ft_dagster itself puts into DAGSTER_HOME."""

Migrations = Mapping[int, Callable[[Path], None]]
"""Number -> what makes a folder of that format one of the next. It must do no harm when it is done again: where it is
cut off, the number stays as it was."""
STORE_MIGRATIONS: Migrations = {}
STATE_MIGRATIONS: Migrations = {}
HOME_MIGRATIONS: Migrations = {}
"""None is needed so far: there is one format of each."""


def read_number(content: bytes | None, where: str, known: int) -> int:
    """The number that was written; what holds none is of the first format, which was written before there were any.

    Args:
        content: of the file or object; None where there is none.
        where: its place, for messages.
        known: the newest number that this version can read.

    Raises:
        StoreError: it is newer, or no number.

    >>> read_number(b"1", "format", 1)
    1
    """
    if content is None:
        return 1
    try:
        number = int(content)
    except ValueError:
        number = 0
    if number < 1:
        raise StoreError(f"{where} is damaged: it holds no number. Write {known} into it, or restore it from a backup.")
    if number > known:
        raise StoreError(
            f"{where} says {number}: this was written by a newer ft_dagster, and this version reads up to {known}. "
            "Nothing was changed. Install the newer version again, or restore a backup of before the upgrade."
        )
    return number


def require_known(folder: Path, known: int) -> int:
    """The number of a folder's format; writes nothing. Raises StoreError if it is newer than what is known."""
    file = folder / NAME
    return read_number(file.read_bytes() if file.is_file() else None, str(file), known)


def bring_up_to(folder: Path, known: int, migrations: Migrations) -> None:
    """Migrate a folder step by step, and write down each number; a new folder gets the number that is known.

    Raises:
        StoreError: it is newer than what is known, or a step is missing.
    """
    file = folder / NAME
    if not folder.is_dir() or not any(folder.iterdir()):
        write_atomically(file, f"{known}\n")
        return
    if not file.exists():
        write_atomically(file, "1\n")
    if require_known(folder, known) == known:
        return
    with FileLock(folder / f".{NAME}.lock"):  # of several processes one migrates
        _migrate(file, known, migrations)


def _migrate(file: Path, known: int, migrations: Migrations) -> None:
    number = require_known(file.parent, known)
    while number < known:
        if number not in migrations:
            raise StoreError(
                f"{file} says {number}, and this version reads {known} and knows no way from the one to the other. "
                "Go there through a version between them."
            )
        migrations[number](file.parent)
        number += 1
        write_atomically(file, f"{number}\n")
