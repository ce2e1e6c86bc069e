"""Which files are reports, what is read from them, and what is reported about unreadable ones."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.files import (
    CorpusError,
    SourceFile,
    Unreadable,
    content_version,
    decode,
    find_reports,
    load_text_files,
    read_file,
    require_reports,
)
from ft_dagster.corpus.index import Scan, scan_reports
from ft_dagster.corpus.markdown import parse_markdown
from ft_dagster.store.hashing import digest

LEADS_OUT = "a symbolic link that leads out of the report folder is not followed; copy the file here"
NOT_REGULAR = "not a regular file, so it is not opened"


def write(workspace: Path, *names: str, content: bytes = b"text\n") -> None:
    for name in names:
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def scan(workspace: Path) -> Scan:
    """Scan and read all report files; there is no index, and none is made."""
    return scan_reports(workspace, workspace / "no index", remember=False)


def paths(workspace: Path) -> list[str]:
    return [found.path for found in find_reports(workspace)]


def only_problem(workspace: Path) -> Unreadable:
    found = scan(workspace)
    (problem,) = found.unreadable
    assert found.files == []
    return problem


def version(workspace: Path, backwards: bool = False) -> str:
    found, step = scan(workspace), -1 if backwards else 1
    return content_version(found.files[::step], found.unreadable[::step])


def test_reports_are_found_in_both_folders_and_their_sub_folders_in_a_fixed_order(tmp_path: Path) -> None:
    write(tmp_path, "outputs/consolidated/b.json", "outputs/consolidated/deep/er/a.JSON")
    write(tmp_path, "chapter_markdowns/z.md", "chapter_markdowns/part 2/Überblick – neu.markdown")
    write(tmp_path, "chapter_markdowns/part 1/a.MD", "chapter_markdowns/a b.md")
    assert paths(tmp_path) == [
        "chapter_markdowns/a b.md",
        "chapter_markdowns/z.md",
        "chapter_markdowns/part 1/a.MD",
        "chapter_markdowns/part 2/Überblick – neu.markdown",
        "outputs/consolidated/b.json",
        "outputs/consolidated/deep/er/a.JSON",
    ]


def test_a_report_file_has_its_name_kind_size_hash_chapter_and_words(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf# A\r\n"
    write(tmp_path, "chapter_markdowns/part/v1.2 é.md", content=data)
    name = "part/v1.2 é"
    path = f"chapter_markdowns/{name}.md"
    assert scan(tmp_path).files == [SourceFile(path, name, "markdown", 8, digest(data), name, 2)]
    assert read_file(tmp_path / path) == data


def test_a_json_report_belongs_to_the_chapter_it_names_and_its_words_are_counted(tmp_path: Path) -> None:
    reviewed = b'{"metadata": {"chapter": 3, "section": "A"}, "final_result": {"final_text": "one two"}}'
    for name, data in {"a": reviewed, "chapter_4_draft": b'{"sections": {"A": "one", "B": "two"}}', "c": b"{"}.items():
        write(tmp_path, f"outputs/consolidated/part/{name}.json", content=data)
    assert [(file.name, file.chapter, file.words) for file in scan(tmp_path).files] == [
        ("part/a", "part/chapter_3", 2),
        ("part/c", "part/c", 0),  # the reason why it cannot be read is reported when its text is requested
        ("part/chapter_4_draft", "part/chapter_4", 2),
    ]


def test_hidden_and_other_files_are_not_reports(tmp_path: Path) -> None:
    write(tmp_path, "chapter_markdowns/.draft.md", "chapter_markdowns/.git/a.md", "chapter_markdowns/notes.txt")
    write(tmp_path, "chapter_markdowns/a.json", "outputs/consolidated/a.md", "outputs/b.json", "c.md")
    write(tmp_path, "chapter_markdowns/a.md~", "chapter_markdowns/.md")
    assert paths(tmp_path) == []


def test_a_link_out_of_the_report_folder_is_reported_and_not_read(tmp_path: Path) -> None:
    write(tmp_path, "secret.md")
    (tmp_path / "chapter_markdowns").mkdir()
    (tmp_path / "chapter_markdowns" / "a.md").symlink_to("../secret.md")
    assert only_problem(tmp_path) == Unreadable("chapter_markdowns/a.md", LEADS_OUT)


def test_a_link_within_the_report_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, "chapter_markdowns/part/a.md")
    (tmp_path / "chapter_markdowns" / "b.md").symlink_to("part/a.md")
    assert paths(tmp_path) == ["chapter_markdowns/b.md", "chapter_markdowns/part/a.md"]


def test_the_report_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/a.md")
    (tmp_path / "chapter_markdowns").symlink_to("elsewhere")
    assert paths(tmp_path) == ["chapter_markdowns/a.md"]


def test_a_link_to_a_folder_is_reported_and_not_entered(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/a.md", "chapter_markdowns/.hidden/a.md")
    (tmp_path / "chapter_markdowns" / "part").symlink_to("../elsewhere")
    (tmp_path / "chapter_markdowns" / ".other").symlink_to("../elsewhere")
    assert only_problem(tmp_path) == Unreadable(
        "chapter_markdowns/part", "a symbolic link to a folder is not followed; put the chapters themselves here"
    )


@pytest.mark.parametrize(
    ("target", "reason"), [("gone.md", "No such file or directory"), ("a.md", "Too many levels of symbolic links")]
)
def test_a_broken_link_or_a_link_to_itself_is_reported(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "chapter_markdowns").mkdir()
    (tmp_path / "chapter_markdowns" / "a.md").symlink_to(target)
    assert only_problem(tmp_path) == Unreadable("chapter_markdowns/a.md", f"it cannot be opened: {reason}")


def test_a_pipe_or_a_socket_is_reported_and_never_opened() -> None:
    # Opening a pipe that no process writes to would block forever. The path of a socket has to be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short) / "outputs" / "consolidated"
        folder.mkdir(parents=True)
        os.mkfifo(folder / "pipe.json")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket.json"))
            found = scan(Path(short))
    assert found.files == []
    assert found.unreadable == [
        Unreadable(f"outputs/consolidated/{name}.json", NOT_REGULAR) for name in ("pipe", "socket")
    ]


@pytest.mark.parametrize("name", [b"caf\xe9.md", b"caf\xe9/a.md"])
def test_a_name_that_is_not_utf_8_is_reported_in_a_form_that_can_be_written(tmp_path: Path, name: bytes) -> None:
    write(tmp_path, os.fsdecode(b"chapter_markdowns/" + name))
    printable = name.decode("utf-8", "backslashreplace")
    assert only_problem(tmp_path) == Unreadable(f"chapter_markdowns/{printable}", "its name is not UTF-8; rename it")


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "chapter_markdowns")  # a file where a folder is expected; a missing folder is not a problem
    assert only_problem(tmp_path) == Unreadable("chapter_markdowns", "the folder cannot be listed: Not a directory")


def test_a_file_that_keeps_changing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "chapter_markdowns/a.md")
    real = Path.stat

    def stat_while_someone_writes(path: Path, **options: Any) -> os.stat_result:
        if path.name == "a.md":
            with path.open("ab") as file:
                file.write(b"more")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat_while_someone_writes)
    assert only_problem(tmp_path) == Unreadable(
        "chapter_markdowns/a.md", "it kept changing while it was read; try again when it has been written"
    )


def test_a_file_that_changes_once_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "chapter_markdowns/a.md", content=b"half")
    real = Path.read_bytes

    def read_and_then_the_rest_arrives(path: Path) -> bytes:
        data = real(path)
        if data == b"half":
            path.write_bytes(b"half and half")
        return data

    monkeypatch.setattr(Path, "read_bytes", read_and_then_the_rest_arrives)
    assert [(file.size, file.sha256) for file in scan(tmp_path).files] == [(13, digest(b"half and half"))]


def test_a_partially_read_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "chapter_markdowns/a.md", content=b"whole")
    answers = [b"who", b"whole"]
    monkeypatch.setattr(Path, "read_bytes", lambda path: answers.pop(0))
    assert read_file(tmp_path / "chapter_markdowns" / "a.md") == b"whole"


def test_a_file_that_the_system_refuses_to_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "chapter_markdowns/a.md")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert only_problem(tmp_path) == Unreadable("chapter_markdowns/a.md", "Permission denied")


def test_a_file_that_was_deleted_is_not_reported_as_a_problem(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone.md")


def test_the_version_of_the_reports_depends_on_names_and_bytes_not_on_place_or_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "chapter_markdowns/a.md", "chapter_markdowns/b.md", "outputs/consolidated/c.json")
        (tmp_path / name / "chapter_markdowns" / "loop.md").symlink_to("loop.md")
    os.utime(tmp_path / "two" / "chapter_markdowns" / "a.md", (0, 0))
    before = version(tmp_path / "one")
    assert version(tmp_path / "two") == before
    assert version(tmp_path / "one", backwards=True) == before
    write(tmp_path / "one", "chapter_markdowns/a.md", content=b"text")
    assert version(tmp_path / "one") != before
    (tmp_path / "two" / "chapter_markdowns" / "loop.md").unlink()
    assert version(tmp_path / "two") != before


def test_a_workspace_without_reports_is_refused_with_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as error:
        require_reports(tmp_path, 0)
    assert str(error.value) == (
        f"No chapters in the workspace {tmp_path}. Put Markdown chapters into {tmp_path}/chapter_markdowns or report "
        f"JSON into {tmp_path}/outputs/consolidated, name another workspace with FT_WORKSPACE, or try "
        "`ft-dagster demo`, which comes with an example report."
    )
    require_reports(tmp_path, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("é".encode("utf-16"), "it is UTF-16, not UTF-8; save it again as UTF-8"),
        (b"\xfe\xff\x00a", "it is UTF-16, not UTF-8; save it again as UTF-8"),
        (
            "Café".encode("latin-1"),
            "byte 3 (0xe9) is not UTF-8; save it again as UTF-8 (Latin-1 and Windows-1252 files are common causes)",
        ),
        (b"ab\x00c", "it holds a NUL at character 2: binary data, not text"),
    ],
)
def test_other_encodings_are_refused_with_the_reason_and_what_to_do(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        decode(data)
    assert str(error.value) == reason


def test_utf_8_is_decoded_unchanged() -> None:
    assert decode(b"\xef\xbb\xbfCaf\xc3\xa9\r\n\r") == "\ufeffCafé\r\n\r"
    assert decode(b"") == ""


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_any_bytes_are_either_refused_with_a_reason_or_read_to_the_last_one(data: bytes) -> None:
    try:
        text = decode(data)
    except ValueError as error:
        assert str(error)
    else:
        assert parse_markdown(text).total_bytes == len(data)


def test_load_text_files_returns_the_text_of_each_file_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "b.md", content=b"second\r\n")
    write(tmp_path, "a.markdown", content="é".encode())
    write(tmp_path, "c/d.md", content=b"third")
    write(tmp_path, ".hidden.md", ".folder/x.md", "e.txt")
    assert load_text_files(tmp_path) == load_text_files(str(tmp_path)) == ["é", "second\r\n", "third"]


def test_load_text_files_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as error:
        load_text_files(tmp_path / "gone")
    assert str(error.value) == (
        f"The folder {tmp_path}/gone does not exist. Create it and put markdown chapters into it."
    )


def test_load_text_files_names_a_folder_without_markdown(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    with pytest.raises(CorpusError) as error:
        load_text_files(tmp_path)
    assert str(error.value) == f"The folder {tmp_path} contains no .md/.markdown file."


def test_load_text_files_names_every_file_that_it_cannot_read(tmp_path: Path) -> None:
    write(tmp_path / "in", "good.md")
    write(tmp_path, "in/bad.md", "out.md", content=b"\x00")
    (tmp_path / "in" / "folder.md").mkdir()
    (tmp_path / "in" / "link.md").symlink_to("../out.md")
    with pytest.raises(CorpusError) as error:
        load_text_files(tmp_path / "in")
    assert str(error.value) == (
        f"Cannot read {tmp_path}/in/bad.md: it holds a NUL at character 0: binary data, not text; "
        f"{tmp_path}/in/folder.md: {NOT_REGULAR}; {tmp_path}/in/link.md: {LEADS_OUT}"
    )
