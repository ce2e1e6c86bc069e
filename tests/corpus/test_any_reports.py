"""For any reports, every byte is accounted for and invisible changes do not change the version."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sections_of import Content, read, reviewed, version

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


PROSE = [
    "Rivers carry [1] sediment.",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "- x\n- y",
    "### Sub {#s}",
    "> said",
    "<b>x</b>",
]
CODE = ["```py\na = 1\n\n\nb = 2\n```", "~~~\n## no heading\n~~~"]
CHAPTER = st.lists(
    st.tuples(st.sampled_from("ABC"), st.booleans(), st.lists(st.sampled_from(PROSE + CODE), max_size=5)), max_size=4
)


def render(chapter: list[tuple[str, bool, list[str]]], blank: str = "\n\n", space: str = "", score: str = "0.5") -> str:
    """Return a chapter's Markdown, made of sections of (title, whether reviewed, blocks)."""
    blocks = ["# Chapter 7"]
    for number, (title, is_reviewed, body) in enumerate(chapter):
        blocks.append(f"## {title}")
        if is_reviewed:
            blocks += ["### Citation Accuracy Analysis", f"**Overall Score: {score}**", "---"]
        blocks += [*body, f"Number {number}."]
    return blank.join(block if block in CODE else block.replace("\n", f"{space}\n") + space for block in blocks)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "a b", "ä/c", "c1", "c01", "c10"]), CHAPTER),
    st.randoms(use_true_random=False),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n\n", "\n\n\n", "\n \n\t\n\n"]),
    st.sampled_from(["", "  ", "\t"]),
    st.sampled_from(["0.5", "0.1</span>\n\n#### Why\n\n- **x**: y"]),
)
def test_invisible_changes_do_not_change_the_version(
    chapters: dict[str, Any], random: Any, end: str, mark: str, blank: str, space: str, score: str
) -> None:
    plain: dict[str, Content] = {f"{name}.md": render(chapter) for name, chapter in chapters.items()}
    names = list(chapters)
    random.shuffle(names)
    edited: dict[str, Content] = {
        f"{name}.md": mark + (render(chapters[name], blank, space, score) + blank).replace("\n", end) for name in names
    }
    assert version(edited) == version(plain)


JSON_TEXT = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["## A\n\n", "## Sub\n\n", "text\n\n", "é", "<!-- x -->", "```\n", "\r\n"])).map("".join),
)
NAME = st.sampled_from(["A", "a:", "REFERENCES", "RESULTS", "é", ""])
EXTRA = st.dictionaries(
    st.sampled_from(["question", "model"]), st.recursive(st.none() | st.floats() | JSON_TEXT, st.lists), max_size=2
)
TIME = st.sampled_from(["2024", "2025", "ä"])
WHOLE = st.dictionaries(
    NAME, st.one_of(JSON_TEXT, st.fixed_dictionaries({"improved": JSON_TEXT}, optional={"original": JSON_TEXT}))
)
REPORT = st.one_of(
    st.builds(lambda sections, extra, time: {**extra, "timestamp": time, "sections": sections}, WHOLE, EXTRA, TIME),
    st.builds(
        lambda extra, *section: extra | reviewed(*section),
        EXTRA,
        st.one_of(st.integers(0, 2), st.sampled_from(["1", "ä"])),
        NAME,
        JSON_TEXT,
        TIME,
        st.none() | st.floats(),
        st.none() | st.integers() | JSON_TEXT,
        st.lists(st.none() | st.lists(st.none() | JSON_TEXT, max_size=2), max_size=2),
    ),
)
BYTES = st.builds(lambda content, plain: json.dumps(content, ensure_ascii=plain).encode(), REPORT, st.booleans())
FILES = st.dictionaries(st.sampled_from([f"chapter_{i}{x}.json" for i in (1, 2) for x in ("", "_a", "_b")]), BYTES)
MARKDOWN = st.dictionaries(st.sampled_from(["chapter_1.md", "chapter_2.md", "chapter_2.markdown"]), JSON_TEXT)


@settings(max_examples=100, deadline=None)
@given(FILES, MARKDOWN, st.booleans(), st.booleans(), st.none() | st.floats(0, 1), st.randoms(use_true_random=False))
def test_any_reports_are_accounted_for_to_the_byte_in_any_order(
    files: dict[str, Content],
    markdown: dict[str, Content],
    drafts: bool,
    bibliographies: bool,
    score: float | None,
    random: Any,
) -> None:
    files |= markdown
    options = {"drafts": drafts, "bibliographies": bibliographies, "minimum_score": score}
    made = read(files, **options)  # checks every byte account
    assert len(made.files) == len(files)
    assert len({section.text for section in made.sections}) == len(made.sections)
    names = list(files)
    random.shuffle(names)
    again = read({name: files[name] for name in names}, **options)
    assert (again.sections, again.pairs, again.about) == (made.sections, made.pairs, made.about)
