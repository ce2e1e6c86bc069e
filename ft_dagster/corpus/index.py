"""What was hashed before: a look at unchanged report files costs reading their status, not their bytes."""

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
"""Raised by hand when the same files would give another snapshot."""
_RACY_NS = 2_000_000_000
"""A file that changed less than this before it was hashed is hashed again at the next look: clocks of file systems
are coarse, and a second change may have left the same time (git's index has the same rule)."""
_LAYOUT = 3
"""Raised when rows of the index are kept in another way: one of another layout is made anew."""
_COLUMNS = (
    "path TEXT PRIMARY KEY, name TEXT, kind TEXT, size INT, sha256 TEXT, chapter TEXT, words INT, "
    "modified_ns INT, changed_ns INT, inode INT, hashed_at_ns INT, checksum INT"
)

_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)
"""Of a damaged index: where the name of a table or column is no UTF-8, SQLite's own message is none, too."""

_Row = tuple[str, str, str, int, str, str, int, int, int, int, int]
"""A SourceFile, then modification time, change time and inode as they were, and when it was hashed."""


@dataclass
class Scan:
    """The report files as one look found them."""

    files: list[SourceFile] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    newest_ns: int = 0
    """When the latest change to any file was made, ns since 1970; 0 without files."""

    @property
    def version(self) -> str:
        return content_version(self.files, self.unreadable)


def scan_reports(workspace: Path, index_path: Path, *, remember: bool = True, doubted: Collection[str] = ()) -> Scan:
    """Look at every report file; read only those whose status is not the one in the index.

    Args:
        workspace: whose reports.
        index_path: the index, an SQLite file that is made where there is none. It holds nothing that the files do
            not say, so a damaged one is made anew.
        remember: whether what was read now is written to the index.
        doubted: paths of files that are read whatever the index says.
    """
    try:
        return _scan(workspace, index_path, remember, doubted)
    except _ERRORS as error:  # damage may show only when rows are written
        if not _is_damage(error):
            raise
    _remove(index_path)
    return _scan(workspace, index_path, remember, doubted)


def _scan(workspace: Path, index_path: Path, remember: bool, doubted: Collection[str]) -> Scan:
    with _no_collections(), _open_index(index_path, remember) as (index, known):
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
        if known:  # files that are gone since the last look; when they went is not known
            scan.newest_ns = time.time_ns()
        if remember and (read or known):
            index.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in known])
            rows = ((*row, _checksum(row)) for row in read)
            index.executemany(f"INSERT OR REPLACE INTO files VALUES ({','.join('?' * 12)})", rows)  # noqa: S608
            index.commit()
    return scan


@contextmanager
def _no_collections() -> Iterator[None]:
    """A row for each file is made and kept: to look for garbage among them over and over takes a tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def changed_since(scan: Scan, seconds: float) -> bool:
    """Whether a file changed in the last seconds: somebody may still be writing. A time to come is a wrong clock's."""
    return 0 <= time.time_ns() - scan.newest_ns < int(seconds * 1e9)


def _is_same(row: _Row, status: os.stat_result) -> bool:
    """Whether a file is the one that was hashed, and was hashed long enough after its last change."""
    return (
        row[3] == status.st_size
        and row[7] == status.st_mtime_ns
        and row[8] == status.st_ctime_ns < row[10] - _RACY_NS
        and row[9] == status.st_ino
    )


def _read(workspace: Path, found: FoundFile) -> SourceFile | Unreadable | None:
    """None for a file that was deleted between looking and reading."""
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
    """The index, and what is in it: path -> row."""
    index, known = _connect(path) if remember else _connect_to_read(path)
    with closing(index):
        yield index, known


def _connect(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):  # or two would replace a damaged one, each under the other
        try:
            return _opened(path)
        except _ERRORS as error:
            if not _is_damage(error):  # locked for a minute, a full disk, no permission
                raise
        _remove(path)
        return _opened(path)


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)


def _connect_to_read(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
    if path.exists():
        index = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
        try:
            if _version(index) == _LAYOUT:
                return index, _rows(index)
        except _ERRORS:  # damaged, or gone by now
            pass
        index.close()
    return sqlite3.connect(":memory:"), {}


def _opened(path: Path) -> tuple[sqlite3.Connection, dict[str, _Row]]:
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
    """Those whose bits are as they were written: SQLite itself has no checksums."""
    rows = index.execute("SELECT * FROM files")
    return {row[0]: row[:-1] for row in rows if row[-1] == _checksum(row[:-1])}


def _checksum(row: _Row) -> int:
    """
    >>> _checksum(("a.md",)) == _checksum(("b.md",))
    False
    """
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass"))


def _version(index: sqlite3.Connection) -> int:
    (version,) = index.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault. What is read from it and is no UTF-8 is an error without a code."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
