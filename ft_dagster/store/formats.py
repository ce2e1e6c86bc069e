"""Numbers of the formats in which folders and buckets are written. Formats of a newer ft_dagster are refused.

There has been only one format of each so far, so nothing is ever migrated.
"""

from pathlib import Path

from ft_dagster.store.local import StoreError, write_atomically

NAME = "ft_dagster-format"
"""Name of the file or object that contains the number."""
STORE, STATE, HOME = 1, 1, 1
"""Numbers that this version writes: for the store (in a folder, or below a bucket's prefix), for `.ft/` of a workspace,
and for what ft_dagster itself writes to DAGSTER_HOME."""


def read_number(content: bytes | None, where: str, known: int) -> int:
    """Return the format number in a file or object.

    Without a file or object the number is 1: the first format was written before there were numbers.

    Args:
        content: content of the file or object; None if it does not exist.
        where: its path or URL, for messages.
        known: the newest number that this version can read.

    Raises:
        StoreError: the number is newer than `known`, or the content is not a number.

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
        raise StoreError(
            f"{where} is damaged: it contains no number. Write {known} into it, or restore it from a backup."
        )
    if number > known:
        raise StoreError(
            f"{where} says {number}: this was written by a newer ft_dagster, and this version reads up to {known}. "
            "Nothing was changed. Install the newer version again, or restore a backup from before the upgrade."
        )
    return number


def require_known(folder: Path, known: int) -> int:
    """Return the number of a folder's format, and write nothing. Raises StoreError if it is newer than `known`."""
    file = folder / NAME
    return read_number(file.read_bytes() if file.is_file() else None, str(file), known)


def mark(folder: Path, known: int) -> None:
    """Write a number into a folder that has none: `known` if the folder is new, otherwise 1.

    Raises:
        StoreError: the number of the folder's format is newer than `known`.
    """
    file = folder / NAME
    if not file.exists():
        is_new = not folder.is_dir() or not any(folder.iterdir())
        write_atomically(file, f"{known if is_new else 1}\n")
    require_known(folder, known)
