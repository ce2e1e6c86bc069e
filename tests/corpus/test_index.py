"""Looking at report files: what did not change is not read again."""

from pathlib import Path
from typing import Any

import pytest

from ft_dagster.corpus import index
from ft_dagster.corpus.files import read_report
from ft_dagster.corpus.index import changed_since, scan_reports


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    names: list[str] = []

    def counted(kind: Any, folder: Path, path: Path, workspace: Path) -> Any:
        names.append(path.name)
        return read_report(kind, folder, path, workspace)

    monkeypatch.setattr(index, "read_report", counted)
    return names


def test_only_files_whose_status_changed_are_read(
    workspace: Path, chapters: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_RACY_NS", -(10**18))  # as if all were written long ago
    first = scan_reports(workspace, workspace / "index.json")
    assert reads == [path.name for path in chapters]
    reads.clear()
    assert scan_reports(workspace, workspace / "index.json") == first
    assert reads == []
    chapters[2].write_text("other")
    second = scan_reports(workspace, workspace / "index.json")
    assert reads == [chapters[2].name] and second.version != first.version


def test_a_file_changed_shortly_before_it_was_hashed_is_hashed_again(
    workspace: Path, chapters: list[Path], reads: list[str]
) -> None:
    scan_reports(workspace, workspace / "index.json")
    reads.clear()
    scan_reports(workspace, workspace / "index.json")
    assert reads == [path.name for path in chapters]


def test_a_deleted_file_is_forgotten(workspace: Path, chapters: list[Path]) -> None:
    scan_reports(workspace, workspace / "index.json")
    chapters[0].unlink()
    scan = scan_reports(workspace, workspace / "index.json")
    assert [file.name for file in scan.files] == [path.stem for path in chapters[1:]]
    assert chapters[0].name not in (workspace / "index.json").read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"chapter_markdowns/chapter_1.md": 3}', "\x00"])
def test_a_damaged_index_is_as_good_as_none(workspace: Path, chapters: list[Path], content: str) -> None:
    expected = scan_reports(workspace, workspace / "index.json")
    (workspace / "index.json").write_text(content)
    assert scan_reports(workspace, workspace / "index.json") == expected


def test_reports_have_settled_when_no_file_changed_for_a_while(workspace: Path, chapters: list[Path]) -> None:
    scan = scan_reports(workspace, workspace / "index.json")
    assert changed_since(scan, 3600)
    assert not changed_since(scan, 0)


def test_a_file_that_vanishes_while_it_is_looked_at_is_not_there(
    workspace: Path, chapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(index, "_status", gone)
    assert scan_reports(workspace, workspace / "index.json").files == []


def test_a_file_that_cannot_be_read_is_reported(
    workspace: Path, chapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ft_dagster.corpus.files._read_settled", refuse)
    scan = scan_reports(workspace, workspace / "index.json")
    assert {item.reason for item in scan.unreadable} == {"Permission denied"} and not scan.files
