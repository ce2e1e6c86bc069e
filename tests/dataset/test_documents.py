"""Sections as text, and where that text may be cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.chapter import Section
from ft_dagster.dataset.documents import Breaks, find_breaks, render, source_spans

TITLES = st.text("Costs #é\t", min_size=1, max_size=8)
SECTIONS = st.builds(
    Section,
    chapter=st.just("a"),
    title=TITLES,
    level=st.integers(0, 6),
    lead=st.lists(TITLES.map(lambda title: f"# {title}"), max_size=2).map(tuple),
    text=st.text(max_size=20),
    source=st.just("a.md"),
    hash=st.just(""),
)


def section(title: str, level: int, lead: tuple[str, ...], text: str) -> Section:
    return Section("a", title, level, lead, text, "a.md", "")


def test_a_document_contains_the_headings_above_its_own_heading_and_the_text() -> None:
    assert render(section("Costs", 2, ("# Report",), "They fell.")) == "# Report\n\n## Costs\n\nThey fell."


def test_text_before_the_first_heading_is_a_document_without_a_heading() -> None:
    assert render(section("", 0, (), "They fell.")) == "They fell."


@settings(max_examples=100, deadline=None)
@given(SECTIONS)
def test_source_spans_are_the_titles_and_the_text_without_marks(section: Section) -> None:
    text = render(section)
    own = [section.title] if section.level else []
    expected = [*(heading.split(" ", 1)[1] for heading in section.lead), *own, section.text]
    assert [text[start:end] for start, end in source_spans(section)] == expected


def test_breaks_are_before_headings_paragraphs_and_lines() -> None:
    text = "one\ntwo\n\nthree\n### four\n\n### five\n"
    assert find_breaks(text) == Breaks(
        headings=[text.index("### four"), text.index("### five")],
        paragraphs=[text.index("three")],
        lines=[text.index("two"), text.index("\nthree"), text.index("\n### five")],
    )


def test_the_start_of_a_text_is_not_a_break() -> None:
    assert find_breaks("# Report") == Breaks([], [], [])


def test_a_hash_without_a_space_is_not_a_heading() -> None:
    assert find_breaks("a\n#b") == Breaks([], [], [2])


def test_inside_a_fence_only_lines_are_breaks() -> None:
    text = "a\n\n```python\n# b\n\nc\n```\n\nd"
    inside = [text.index("# b"), text.index("\nc\n"), text.index("c\n`"), text.index("```\n\nd")]
    blank = [text.index("\n```python"), text.index("\nd")]
    assert find_breaks(text) == Breaks(
        headings=[],
        paragraphs=[text.index("```python"), text.index("d", 18)],
        lines=sorted([*inside, *blank]),
    )


def test_a_fence_ends_at_a_fence_of_its_own_kind_and_length_only() -> None:
    for inner in ("~~~", "```", "````text"):
        text = f"````\n{inner}\n# b\n`````\n# c"
        assert find_breaks(text).headings == [text.index("# c")]


def test_a_code_span_of_three_backticks_does_not_open_a_fence() -> None:
    text = "```x``` is code.\n\n## Next\n\nThen"
    assert find_breaks(text) == Breaks([18], [text.index("Then")], [17, text.index("\nThen")])
