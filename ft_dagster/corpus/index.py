"""The index of hashed report files, with which a scan of unchanged files reads only their status, not their bytes."""

import gc
import os
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from ft_dagster.corpus.files import FoundFile, SourceFile, Unreadable, content_version, find_reports, read_file
from ft_dagster.corpus.report_json import describe_content
from ft_dagster.store.hashing import digest

CODE_VERSION = "2"
"""Increased by hand when the same files would result in another snapshot."""
_RACY_NS = 2_000_000_000
"""A file that changed less than this before it was hashed is hashed again in the next scan: the clocks of file systems
are coarse, and a second change may have left the same timestamp (git's index has the same rule)."""
_LAYOUT = 3
"""Increased when the columns of the index change. An index with another layout is rebuilt."""
_COLUMNS = (
    "path TEXT PRIMARY KEY, name TEXT, kind TEXT, size INT, sha256 TEXT, chapter TEXT, words INT, "
    "modified_ns INT, changed_ns INT, inode INT, hashed_at_ns INT, checksum INT"
)

_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)
"""Errors that a damaged index raises. If the name of a table or column is not UTF-8, neither is SQLite's message."""

_Row = tuple[str, str, str, int, str, str, int, int, int, int, int]
"""The fields of a SourceFile, then its modification time, change time and inode, and when it was hashed."""


@dataclass
class Scan:
    """The report files that one scan found."""

    files: list[SourceFile] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    newest_ns: int = 0
    """Time of the latest change to any file, in nanoseconds since 1970; 0 if there are no files."""

    @property
    def version(self) -> str:
        return content_version(self.files, self.unreadable)


def scan_reports(workspace: Path, index_path: Path, *, remember: bool = True, doubted: Collection[str] = ()) -> Scan:
    """Find every report file, and read only those whose status differs from the one in the index.

    Args:
        workspace: the folder of the workspace.
        index_path: the index, an SQLite file that is created if it does not exist. It contains nothing that cannot be
            read from the files again, so a damaged index is rebuilt.
        remember: whether the files that were read are recorded in the index.
        doubted: paths of files that are read whatever the index says.
    """
    try:
        return _scan(workspace, index_path, remember, doubted)
    except _ERRORS as error:  # damage may become apparent only when rows are written
        if not _is_damage(error):
            raise
    _remove(index_path)
    return _scan(workspace, index_path, remember, doubted)


def _scan(workspace: Path, index_path: Path, remember: bool, doubted: Collection[str]) -> Scan:
    with _garbage_collection_paused(), _open_index(index_path, remember) as (index, known):
        scan = Scan()
        read: list[_Row] = []
        for found in find_reports(workspace):
            if isinstance(found, Unreadable):
                scan.unreadable.append(found)
                continue
            status = found.status
            scan.newest_ns = max(scan.newest_ns, status.st_ctime_ns)
            row = known.pop(found.path, None)
            if row is None or found.path in doubted or not _is_same(row, status):
                hashed_at = time.time_ns()
                file = _read(workspace, found)
                if file is None:
                    continue
                if isinstance(file, Unreadable):
                    scan.unreadable.append(file)
                    continue
                row = (*file, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, hashed_at)
                read.append(row)
            scan.files.append(SourceFile(*row[:7]))  # type: ignore[arg-type]
        if known:  # files deleted since the last scan; the time of deletion is not known
            scan.newest_ns = time.time_ns()
        if remember and (read or known):
            index.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in known])
            rows = ((*row, _checksum(row)) for row in read)
            index.executemany(f"INSERT OR REPLACE INTO files VALUES ({','.join('?' * 12)})", rows)  # noqa: S608
            index.commit()
    return scan


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection, which would take a tenth of a scan's time: a row is created and kept per file."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def changed_since(scan: Scan, seconds: float) -> bool:
    """Whether a file changed in the last `seconds`, so that somebody may still be writing.

    A change in the future does not count: it comes from a wrong clock.
    """
    return 0 <= time.time_ns() - scan.newest_ns < int(seconds * 1e9)


def _is_same(row: _Row, status: os.stat_result) -> bool:
    """Whether a file is unchanged since it was hashed, and was hashed long enough after its last change."""
    return (
        row[3] == status.st_size
        and row[7] == status.st_mtime_ns
        and row[8] == status.st_ctime_ns < row[10] - _RACY_NS
        and row[9] == status.st_ino
    )


def _read(workspace: Path, found: FoundFile) -> SourceFile | Unreadable | None:
    """Read and describe a file. Return None if the file was deleted after it was found."""
    try:
        data = read_file(workspace / found.path)
    except FileNotFoundError:
        return None
    if isinstance(data, str):
        return Unreadable(found.path, data)
    chapter, words = describe_content(found.kind, found.name, data)
    return SourceFile(found.path, found.name, found.kind, len(data), digest(data), chapter, words)


@contextmanager
def _open_index(path: Path, remember: bool) -> Iterator[tuple[sqlite3.Connection, dict[str, _Row]]]:
    """Open the index, and yield it with its rows: path -> row."""
    index, known = _connect(path) if remember else _connect_to_read(path)
    with closing(index):
        yield index, known


def _connect(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the lock, two processes could replace a damaged index under each other.
    with FileLock(path.with_name(path.name + ".lock")):
        try:
            return _open_or_create(path)
        except _ERRORS as error:
            if not _is_damage(error):  # such as a lock held for a minute, a full disk, or no permission
                raise
        _remove(path)
        return _open_or_create(path)


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)


def _connect_to_read(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
    if path.exists():
        index = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
        try:
            if _version(index) == _LAYOUT:
                return index, _rows(index)
        except _ERRORS:  # the index is damaged, or was deleted meanwhile
            pass
        index.close()
    return sqlite3.connect(":memory:"), {}


def _open_or_create(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
    index = sqlite3.connect(path, timeout=60)
    try:
        if _version(index) != _LAYOUT:
            index.execute("BEGIN IMMEDIATE")
            index.execute("DROP TABLE IF EXISTS files")
            index.execute(f"CREATE TABLE files ({_COLUMNS})")
            index.execute(f"PRAGMA user_version = {_LAYOUT}")
            index.commit()
        return index, _rows(index)
    except BaseException:
        index.close()
        raise


def _rows(index: sqlite3.Connection) -> dict[str, _Row]:
    """Return the rows whose checksum is correct, by path. SQLite itself has no checksums."""
    rows = index.execute("SELECT * FROM files")
    return {row[0]: row[:-1] for row in rows if row[-1] == _checksum(row[:-1])}


def _checksum(row: _Row) -> int:
    """Return a checksum that detects a damaged row.

    >>> _checksum(("a.md",)) == _checksum(("b.md",))
    False
    """
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass"))


def _version(index: sqlite3.Connection) -> int:
    (version,) = index.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_damage(error: Exception) -> bool:
    """Whether the error comes from a damaged file. Data that is not UTF-8 raises an error without an SQLite code."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
