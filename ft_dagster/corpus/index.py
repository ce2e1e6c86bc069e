"""What was hashed before: a look at unchanged report files costs reading their status, not their bytes."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from ft_dagster.corpus.files import SourceFile, Unreadable, content_version, find_reports, read_report
from ft_dagster.store import write_atomically

CODE_VERSION = "1"
"""Raised by hand when the same files would give another snapshot."""
_RACY_NS = 2_000_000_000
"""A file that changed less than this before it was hashed is hashed again at the next look: clocks of file systems
are coarse, and a second change may have left the same time (git's index has the same rule)."""

_Status = tuple[int, int, int, int]
"""Size, modification time, change time (both ns) and inode."""


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


def scan_reports(workspace: Path, index_path: Path) -> Scan:
    """Look at every report file; read only those whose status is not the one remembered in `index_path`."""
    remembered = _read_index(index_path)
    index: dict[str, tuple[_Status, int, str, str]] = {}
    scan = Scan()
    for found in find_reports(workspace):
        if isinstance(found, Unreadable):
            scan.unreadable.append(found)
            continue
        kind, folder, path = found
        place = path.relative_to(workspace).as_posix()
        try:
            status = _status(path)
        except OSError:
            continue  # deleted between listing and looking
        scan.newest_ns = max(scan.newest_ns, status[2])
        known = remembered.get(place)
        if known and known[0] == status and status[2] < known[1] - _RACY_NS:
            index[place] = known
            scan.files.append(SourceFile(place, known[3], kind, status[0], known[2]))
            continue
        hashed_at = time.time_ns()
        read = read_report(kind, folder, path, workspace)
        if isinstance(read, Unreadable):
            scan.unreadable.append(read)
        else:
            scan.files.append(read[0])
            index[place] = (status, hashed_at, read[0].sha256, read[0].name)
    if index != remembered:
        write_atomically(index_path, json.dumps(index, ensure_ascii=False))
    return scan


def _status(path: Path) -> _Status:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_index(path: Path) -> dict[str, tuple[_Status, int, str, str]]:
    """What is remembered; nothing if the file is missing or damaged: everything is hashed then."""
    try:
        content = json.loads(path.read_bytes())
        return {place: (tuple(status), at, sha256, name) for place, (status, at, sha256, name) in content.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def changed_since(scan: Scan, seconds: float) -> bool:
    """Whether a file changed in the last seconds: somebody may still be writing."""
    return scan.newest_ns > time.time_ns() - int(seconds * 1e9)
