"""The number of the format in which a folder, or a bucket, was written; one of a newer ft_dagster is refused.

There is one format of each so far, so that nothing is ever migrated.
"""

from pathlib import Path

from ft_dagster.store.local import StoreError, write_atomically

NAME = "ft_dagster-format"
"""File, or object, that holds the number."""
STORE, STATE, HOME = 1, 1, 1
"""What this version writes: the store (of a folder, or below a bucket's prefix), `.ft/` of a workspace, and what
ft_dagster itself puts into DAGSTER_HOME."""


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


def mark(folder: Path, known: int) -> None:
    """Write the number into a folder that has none, a new one or one of before there were numbers.

    Raises:
        StoreError: the folder is of a newer format than what is known.
    """
    file = folder / NAME
    if not file.exists():
        is_new = not folder.is_dir() or not any(folder.iterdir())
        write_atomically(file, f"{known if is_new else 1}\n")
    require_known(folder, known)
