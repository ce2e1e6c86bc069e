"""Scanning report files: unchanged files are not read again."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.corpus import index
from ft_dagster.corpus.files import read_file
from ft_dagster.corpus.index import changed_since, scan_reports

LONG_AGO = -(10**18)
FLIPS = int(os.environ.get("FAULTS", "40"))
"""How many positions of a file are damaged, one after the other."""


@pytest.fixture
def db(workspace: Path) -> Path:
    """Return the path of the index, which may not exist yet."""
    return workspace / ".ft" / "files.db"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that were read, in order."""
    names: list[str] = []

    def counted(path: Path) -> bytes | str:
        names.append(path.name)
        return read_file(path)

    monkeypatch.setattr(index, "read_file", counted)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all files appear to have been written long before they were hashed."""
    monkeypatch.setattr(index, "_RACY_NS", LONG_AGO)


def change_index(db: Path, *statements: str) -> None:
    with closing(sqlite3.connect(db)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def indexed_paths(db: Path) -> list[str]:
    with closing(sqlite3.connect(db)) as connection:
        return [path for (path,) in connection.execute("SELECT path FROM files ORDER BY path")]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file under a folder with its inode and time of change."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_ino, status.st_ctime_ns) for path, status in found.items()}


@pytest.mark.usefixtures("settled")
def test_only_files_whose_status_changed_are_read(
    workspace: Path, chapters: list[Path], reads: list[str], db: Path
) -> None:
    first = scan_reports(workspace, db)
    assert reads == [path.name for path in chapters]
    reads.clear()
    assert scan_reports(workspace, db) == first
    assert reads == []
    chapters[2].write_text("other")
    second = scan_reports(workspace, db)
    assert reads == [chapters[2].name] and second.version != first.version


def test_a_file_changed_shortly_before_it_was_hashed_is_hashed_again(
    workspace: Path, chapters: list[Path], reads: list[str], db: Path
) -> None:
    scan_reports(workspace, db)
    reads.clear()
    scan_reports(workspace, db)
    assert reads == [path.name for path in chapters]


def test_a_second_change_that_keeps_size_and_times_is_detected(workspace: Path, chapters: list[Path], db: Path) -> None:
    first = scan_reports(workspace, db)
    text = chapters[0].read_text()
    chapters[0].write_text(text.replace("item 10.", "item 99."))
    status = chapters[0].stat()
    # A coarse clock has this effect: the index has the current status of the file and the hash of its earlier content.
    change_index(
        db,
        f"UPDATE files SET modified_ns = {status.st_mtime_ns}, changed_ns = {status.st_ctime_ns}, "
        f"hashed_at_ns = {status.st_ctime_ns + 1_000_000} WHERE path = 'chapter_markdowns/{chapters[0].name}'",
    )
    second = scan_reports(workspace, db)
    assert [file.size for file in second.files] == [file.size for file in first.files]
    assert second.version != first.version


@pytest.mark.usefixtures("settled")
def test_another_file_under_the_same_name_is_read(
    workspace: Path, chapters: list[Path], reads: list[str], db: Path
) -> None:
    first = scan_reports(workspace, db)
    status = chapters[0].stat()
    other = workspace / "other"
    other.write_bytes(chapters[0].read_bytes().replace(b"item 10.", b"item 99."))
    other.replace(chapters[0])
    os.utime(chapters[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    now = chapters[0].stat()
    assert (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns) and now.st_ino != status.st_ino
    change_index(db, f"UPDATE files SET changed_ns = {now.st_ctime_ns} WHERE inode = {status.st_ino}")
    reads.clear()
    assert scan_reports(workspace, db).version != first.version
    assert reads == [chapters[0].name]


def test_a_deleted_file_is_forgotten(workspace: Path, chapters: list[Path], db: Path) -> None:
    scan_reports(workspace, db)
    chapters[0].unlink()
    scan = scan_reports(workspace, db)
    assert [file.name for file in scan.files] == [path.stem for path in chapters[1:]]
    assert indexed_paths(db) == [f"chapter_markdowns/{path.name}" for path in chapters[1:]]


@pytest.mark.usefixtures("settled")
def test_the_chapter_that_a_json_report_names_is_remembered(workspace: Path, reads: list[str], db: Path) -> None:
    folder = workspace / "outputs" / "consolidated"
    folder.mkdir(parents=True)
    report = {"metadata": {"chapter": 3, "section": "A"}, "final_result": {"final_text": "one two three"}}
    (folder / "whatever.json").write_text(json.dumps(report))
    first = scan_reports(workspace, db)
    assert [(file.name, file.chapter, file.words) for file in first.files] == [("whatever", "chapter_3", 3)]
    assert scan_reports(workspace, db) == first
    assert reads == ["whatever.json"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"chapter_markdowns/chapter_1.md": 3}', b"\x00", b"SQLite format 3\0"]
)
def test_a_damaged_index_is_ignored_and_rebuilt(
    workspace: Path, chapters: list[Path], db: Path, content: bytes
) -> None:
    expected = scan_reports(workspace, db)
    db.write_bytes(content)
    assert scan_reports(workspace, db, remember=False) == expected
    assert db.read_bytes() == content
    assert scan_reports(workspace, db) == expected
    assert len(indexed_paths(db)) == len(chapters)


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("damage", ["cut short", "a page", "the table", "a text"])
def test_an_index_that_is_damaged_inside_is_ignored(
    workspace: Path, chapters: list[Path], db: Path, damage: str, remember: bool
) -> None:
    expected = scan_reports(workspace, db)
    data = db.read_bytes()
    if damage == "a page":
        db.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    elif damage == "cut short":
        db.write_bytes(data[:4096])
    elif damage == "the table":
        change_index(db, "DROP TABLE files")
    else:
        change_index(db, "UPDATE files SET sha256 = CAST(x'ff' AS TEXT)")
    assert scan_reports(workspace, db, remember=remember) == expected
    if remember:
        assert len(indexed_paths(db)) == len(chapters)


@pytest.mark.usefixtures("settled", "without_waiting_for_the_disk")
@pytest.mark.parametrize("remember", [True, False])
def test_a_flipped_bit_in_the_index_never_hides_what_the_files_contain(
    workspace: Path, chapters: list[Path], db: Path, remember: bool
) -> None:
    expected = scan_reports(workspace, db)
    written = db.read_bytes()
    used = [at for at, byte in enumerate(written) if byte]  # the rest is space that SQLite has not used yet
    for at in used[:: max(1, len(used) // FLIPS)]:
        damaged = bytearray(written)
        damaged[at] ^= 1 << (at % 8)
        db.write_bytes(damaged)
        assert scan_reports(workspace, db, remember=remember) == expected, f"bit {at % 8} of byte {at}"


@pytest.mark.usefixtures("settled")
def test_an_index_of_another_version_of_the_code_is_rebuilt(
    workspace: Path, chapters: list[Path], reads: list[str], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scan_reports(workspace, db)
    change_index(db, "DROP TABLE files", "CREATE TABLE files (path TEXT)", "PRAGMA user_version = 1")
    reads.clear()
    assert scan_reports(workspace, db) == expected
    assert reads == [path.name for path in chapters]
    assert indexed_paths(db) == [f"chapter_markdowns/{path.name}" for path in chapters]


def test_a_scan_with_remember_false_writes_nothing(workspace: Path, chapters: list[Path], db: Path) -> None:
    before = tree(workspace)
    scan = scan_reports(workspace, db, remember=False)
    assert len(scan.files) == len(chapters)
    assert tree(workspace) == before  # not even a folder
    scan_reports(workspace, db)
    chapters[0].write_text("other")
    chapters[1].unlink()
    before = tree(workspace)
    assert scan_reports(workspace, db, remember=False).version != scan.version
    assert tree(workspace) == before
    change_index(db, "PRAGMA user_version = 1")
    before = tree(workspace)
    assert len(scan_reports(workspace, db, remember=False).files) == len(chapters) - 1
    assert tree(workspace) == before


@pytest.mark.usefixtures("settled")
def test_a_scan_with_remember_false_uses_what_other_scans_remembered(
    workspace: Path, chapters: list[Path], reads: list[str], db: Path
) -> None:
    expected = scan_reports(workspace, db)
    reads.clear()
    assert scan_reports(workspace, db, remember=False) == expected
    assert reads == []


def test_reports_are_settled_when_no_file_changed_for_a_while(workspace: Path, chapters: list[Path], db: Path) -> None:
    scan = scan_reports(workspace, db)
    assert changed_since(scan, 3600)
    assert not changed_since(scan, 0)


def test_a_file_that_vanishes_before_its_status_is_read_is_skipped(
    workspace: Path, chapters: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = os.scandir

    @contextmanager
    def list_and_lose(folder: str) -> Iterator[list[os.DirEntry[str]]]:
        with listing(folder) as entries:
            found = list(entries)
        chapters[0].unlink(missing_ok=True)
        yield found

    monkeypatch.setattr(os, "scandir", list_and_lose)
    scan = scan_reports(workspace, db)
    assert [file.name for file in scan.files] == [path.stem for path in chapters[1:]]
    assert scan.unreadable == []


def test_a_file_that_vanishes_before_it_is_read_is_skipped(
    workspace: Path, chapters: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(index, "read_file", gone)
    scan = scan_reports(workspace, db)
    assert (scan.files, scan.unreadable) == ([], [])


def test_a_file_that_cannot_be_read_is_reported_by_every_scan(
    workspace: Path, chapters: list[Path], db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ft_dagster.corpus.files._read_settled", refuse)
    for _ in range(2):
        scan = scan_reports(workspace, db)
        assert {item.reason for item in scan.unreadable} == {"Permission denied"} and not scan.files


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_several_scans_at_once_without_a_usable_index_all_succeed(
    workspace: Path, chapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    version = index._version

    def slowly(connection: sqlite3.Connection) -> int:
        try:
            return version(connection)
        finally:
            time.sleep(0.02)  # the others see the same state

    monkeypatch.setattr(index, "_version", slowly)
    for db in (tmp_path / f"{number}.db" for number in range(3)):
        if content is not None:
            db.write_bytes(content)
        with ThreadPoolExecutor(6) as pool:
            scans = list(pool.map(lambda path: scan_reports(workspace, path), [db] * 6))
        assert all(scan == scans[0] for scan in scans)
        assert len(indexed_paths(db)) == len(chapters)
