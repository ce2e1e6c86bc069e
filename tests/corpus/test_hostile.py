"""Chapters made to break the reader: none stops the others, and no byte of any is silently lost."""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sections_of import read, texts
from work import calls

from ft_dagster.corpus import files as files_room
from ft_dagster.corpus.files import Unreadable, find_reports
from ft_dagster.corpus.index import scan_reports
from ft_dagster.corpus.markdown import parse_markdown
from fuzz.invariants import CONTROL, check_json, check_markdown, check_secrets, check_tokens

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

EXAMPLES = int(os.environ.get("FT_TEST_HOSTILE", "150"))
"""How many inputs each property test of this module generates; `make fuzz` searches thoroughly."""
MARKS = (
    *("# ", "## ", "### Citation Accuracy Analysis\n", "## References\n", "---\n", "\n", "\r", "\t", "\x0b", "```\n"),
    *("    ", "> ", "- ", "1. ", "|a|\n|-|\n", "<!--", "-->", "<div>", "{#a}", "`", "*", "[", "](", "\\", "\ufeff"),
    *("\u2028", "\u0085", "\u2581", "é", "🎉", "text", "\x00", *CONTROL),
)
PIECES = st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=30).map("".join)
BYTES = st.binary(max_size=60) | PIECES.map(lambda text: text.encode("utf-8", "surrogatepass"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | PIECES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PIECES, inner, max_size=3),
    max_leaves=8,
)
KEYS = ("sections", "metadata", "final_result", "iterations", "improved", "original", "timestamp", "chapter", "section")
REPORTS = st.dictionaries(
    st.sampled_from([*KEYS, "final_text"]), VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES)
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(BYTES)
def test_any_bytes_are_read_as_a_chapter_or_reported_with_a_problem(data: bytes) -> None:
    check_markdown(data)
    check_json(data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(REPORTS, st.booleans())
def test_any_values_under_the_keys_of_a_report_are_read_or_refused(content: object, plain: bool) -> None:
    check_json(json.dumps(content, ensure_ascii=plain).encode("utf-8", "surrogatepass"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(PIECES)
def test_no_control_token_comes_out_of_any_text(text: str) -> None:
    check_tokens(text)


@settings(max_examples=EXAMPLES, deadline=None)
@given(PIECES)
def test_any_text_can_be_searched_for_keys(text: str) -> None:
    check_secrets(text)


@pytest.mark.parametrize("control", CONTROL)
def test_the_spelling_of_a_control_token_stays_text_everywhere(control: str) -> None:
    for text in (control, f"## {control}\n\n{control}{control}", f"```\n{control}\n```", f"a{control}b", control[:-1]):
        check_tokens(text)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "latin.md": (b"caf\xe9", "byte 3 (0xe9) is not UTF-8"),
    "cut.md": ("é".encode()[:1], "is not UTF-8"),
    "surrogate.md": (b"\xed\xa0\x80", "is not UTF-8"),
    "overlong.md": (b"\xc0\xaf", "is not UTF-8"),
    "nul.md": (b"a\x00b", "it holds a NUL at character 1"),
    "wide.md": ("text".encode("utf-16"), "it is UTF-16"),
    "deep.json": (b"[" * 1_000_000, "it is nested too deeply to be a report"),
    "objects.json": (b'{"a":' * 1_000_000, "it is nested too deeply to be a report"),
    "digits.json": (b'{"sections": {}, "a": ' + b"9" * 1_000_000 + b"}", "it holds a number of 1000000 digits"),
    "twice.json": (b'{"sections": {}, "sections": {}}', "the key 'sections' is given twice"),
    "nul.json": (b'{"sections": {"A": "a\\u0000"}}', "holds \\u0000, which is not text"),
    "half.json": (b'{"sections": {"A": "\\ud800"}}', "holds \\ud800, which is not text"),
}


def test_each_hostile_file_is_reported_with_its_reason_and_the_others_are_read() -> None:
    made = read({name: data for name, (data, _) in HOSTILE.items()} | {"good.md": "Good text."}, drafts=True)
    assert [section.text for section in made.sections] == ["Good text."]
    reasons = {Path(item["path"]).name: item["reason"] for item in made.unreadable}
    assert reasons.keys() == HOSTILE.keys()
    for name, (_, reason) in HOSTILE.items():
        assert reason in reasons[name]


GROWING: dict[str, Callable[[int], str]] = {
    "headings": lambda n: "".join(f"## H{i}\n\nt{i}\n\n" for i in range(n // 14)),
    "quotes in quotes": lambda n: "> " * (n // 2) + "a",
    "lists in lists": lambda n: "- " * (n // 2) + "a",
    "brackets": lambda n: "[" * n,
    "lines with a bracket": lambda n: "[a\n" * (n // 3),
    "backticks": lambda n: "`a``" * (n // 4),
    "emphasis": lambda n: "*a_ " * (n // 4),
    "comments without an end": lambda n: "<!-- " * (n // 5),
    "comments and backticks": lambda n: "<!-- " + "`<!--" * (n // 5),
    "attributes": lambda n: "### a " + "{#" * (n // 2),
    "spaces": lambda n: "a" + " " * n + "b",
    "blank lines": lambda n: "a" + "\n" * n + "b",
    "a wide table": lambda n: "|" * (n // 2) + "\n" + "|-" * (n // 4),
}


@pytest.mark.parametrize("shape", GROWING)
def test_no_byte_of_a_large_chapter_of_any_shape_is_lost(shape: str) -> None:
    check_markdown(GROWING[shape](240_000).encode())


@pytest.mark.parametrize("shape", ["headings", "lists in lists", "lines with a bracket", "blank lines", "a wide table"])
def test_the_work_for_a_chapter_grows_no_faster_than_its_size(shape: str) -> None:
    def work(size: int) -> int:
        text = GROWING[shape](size)
        return calls(lambda: parse_markdown(text))

    assert work(48_000) < 2 * 16 * work(3_000)  # if the work were quadratic it would be 256 times as much


@pytest.mark.parametrize("depth", [100, 10_000, 200_000])
def test_text_within_deep_nesting_is_not_lost(depth: int) -> None:
    for mark in ("> ", "- ", "1. ", "* "):
        ((_, _, found),) = texts({"a.md": mark * depth + "inside"})
        assert found == mark * depth + "inside"


def test_a_line_of_fifty_megabytes_is_a_section() -> None:
    line = "word " * 10_000_000
    parsed = parse_markdown(line)
    assert [section.text for section in parsed.sections] == [line.rstrip()]
    assert parsed.total_bytes == len(line)


def test_a_report_with_tens_of_thousands_of_headings_has_as_many_sections() -> None:
    found = texts({"a.md": "".join(f"## H{i}\n\nText {i}.\n\n" for i in range(10_000))})
    assert found == [("a", f"H{i}", f"Text {i}.") for i in range(10_000)]


@pytest.mark.parametrize("chapter", ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "a\nb", "~root", "C:\\x"])
def test_the_name_that_a_report_gives_its_chapter_is_never_a_path(chapter: str, tmp_path: Path) -> None:
    content = {"metadata": {"chapter": chapter, "section": "A"}, "final_result": {"final_text": "Text of it."}}
    folder = tmp_path / "outputs" / "consolidated"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    made = read({"a.json": content})
    assert [section.text for section in made.sections] == ["Text of it."]
    assert made.sections[0].source == "outputs/consolidated/a.json"
    assert sorted(tmp_path.rglob("*")) == before


def test_outside_links_pipes_sockets_and_devices_are_reported_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "chapter_markdowns"
    folder.mkdir()
    (tmp_path / "secret.md").write_text("not a chapter")
    (folder / "good.md").write_text("Good text.")
    (folder / "out.md").symlink_to(tmp_path / "secret.md")
    (folder / "up.md").symlink_to("../secret.md")
    (folder / "device.md").symlink_to("/dev/zero")
    (folder / "self.md").symlink_to("self.md")
    (folder / "all").symlink_to("/")
    os.mkfifo(folder / "pipe.md")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.md"))
        if os.geteuid() == 0:
            os.mknod(folder / "zero.md", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        opened: list[str] = []
        real = files_room.read_file
        monkeypatch.setattr("ft_dagster.corpus.index.read_file", lambda path: opened.append(path.name) or real(path))
        scan = scan_reports(tmp_path, tmp_path / "files.db")
    assert [file.name for file in scan.files] == ["good"] and opened == ["good.md"]
    named = {Path(item.path).name for item in scan.unreadable}
    assert named >= {"out.md", "up.md", "device.md", "self.md", "all", "pipe.md", "socket.md"}
    assert all(isinstance(item, Unreadable) for item in find_reports(tmp_path) if "good" not in item.path)
