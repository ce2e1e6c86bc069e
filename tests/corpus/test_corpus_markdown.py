"""Markdown becomes sections: what is kept, what is left out and why, and that both together are the complete text."""

import re
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.markdown import Heading, ParsedSection, normal_title, parse_markdown

REVIEW = (
    "### Citation Accuracy Analysis\n\n**Overall Score: 0.82**\n\n#### Individual Citation Analysis\n\n"
    "- **Citation [3]**: Score: <span style='color:orange'>0.55</span>\n  - **Suggestion**: check it.\n\n---\n\n"
)


def texts(source: str, **options: Any) -> list[tuple[str, str]]:
    """Return (title, text) of each section."""
    return [(section.title, section.text) for section in parse_markdown(source, **options).sections]


def left_out(source: str, **options: Any) -> dict[str, int]:
    return dict(parse_markdown(source, **options).left_out)


def test_a_generated_chapter_is_split_into_sections_without_review_and_bibliography() -> None:
    source = (
        f"# Chapter 3\n\n## BACKGROUND KNOWLEDGE\n\n{REVIEW}Prose with [3].\n\nMore.\n\n"
        "## CURRENT RESEARCH\n\nOther prose.\n\n## REFERENCES\n\n[3] Smith.\n"
    )
    parsed = parse_markdown(source)
    assert parsed.sections == [
        ParsedSection("BACKGROUND KNOWLEDGE", 2, (), "Prose with [3].\n\nMore."),
        ParsedSection("CURRENT RESEARCH", 2, (), "Other prose."),
    ]
    assert parsed.left_out == {
        "chapter number": len("Chapter 3"),
        "review block": len(REVIEW) - 1,  # its last blank line is white space
        "bibliography": len("## REFERENCES\n\n[3] Smith.\n"),
        "heading marks": len("# \n") + len("## \n") * 2,
        "white space": 8,
    }
    assert parsed.total_bytes == len(source)


def test_headings_of_level_1_and_2_start_sections_and_deeper_ones_are_text() -> None:
    source = "# A\n\none\n\n## B ##\n\ntwo\n\n### C\n\nthree\n\nD\n===\n\nfour\n\nE\n---\nfive"
    assert parse_markdown(source).sections == [
        ParsedSection("A", 1, (), "one"),
        ParsedSection("B", 2, (), "two\n\n### C\n\nthree"),
        ParsedSection("D", 1, (), "four"),
        ParsedSection("E", 2, (), "five"),
    ]


def test_a_setext_heading_of_two_lines_is_one_title() -> None:
    parsed = parse_markdown("A\r\nB\r\n===\r\n\r\ntext")
    assert parsed.sections == [ParsedSection("A B", 1, (), "text")]
    assert parsed.left_out == {"heading marks": 8, "line ends": 1, "white space": 1}


def test_text_before_the_first_heading_is_a_section_without_title() -> None:
    assert parse_markdown("Hello.\n\n## A\n\ntext").sections == [
        ParsedSection("", 0, (), "Hello."),
        ParsedSection("A", 2, (), "text"),
    ]


def test_headings_without_text_become_headings_of_the_next_section() -> None:
    parsed = parse_markdown("# Report\n\n## Part\n\n## A\n\ntext\n\n## B\n")
    lead = (Heading(1, "Report"), Heading(2, "Part"))
    assert parsed.sections == [ParsedSection("A", 2, lead, "text")]
    assert [str(heading) for heading in lead] == ["# Report", "## Part"]
    assert parsed.sections[0].kept_bytes == len("Report" + "Part" + "A" + "text")
    assert parsed.left_out["heading without text"] == len("B")


def test_a_heading_may_be_empty() -> None:
    assert parse_markdown("## {#sec:a}\n\ntext").sections == [ParsedSection("", 2, (), "text")]


@pytest.mark.parametrize("block", ["```\n## A\n```", "~~~~\n# A\n~~~\n## B\n~~~~", "    ## A", "> ## A", "- ## A"])
def test_what_looks_like_a_heading_in_code_a_quote_or_a_list_is_text(block: str) -> None:
    assert texts(f"## T\n\nx\n\n{block}\n\ny") == [("T", f"x\n\n{block}\n\ny")]


def test_heading_attributes_are_left_out() -> None:
    source = "## Methods {#sec:methods}\n\ntext {#kept}\n\n### Data {.unnumbered #sec:data}  \n\nmore"
    assert texts(source) == [("Methods", "text {#kept}\n\n### Data\n\nmore")]
    assert left_out(source)["heading attributes"] == len(" {.unnumbered #sec:data}  ")


@pytest.mark.parametrize("title", ["Chapter 3", "CHAPTER 12.", "chapter  7"])
def test_a_chapters_number_is_left_out(title: str) -> None:
    assert texts(f"# {title}\n\n## A\n\ntext") == [("A", "text")]
    assert left_out(f"# {title}\n\n## A\n\ntext")["chapter number"] == len(title)


def test_a_chapters_own_title_and_a_number_at_level_2_are_kept() -> None:
    assert parse_markdown("# Chapter 3: Rivers\n\n## Chapter 4\n\ntext").sections == [
        ParsedSection("Chapter 4", 2, (Heading(1, "Chapter 3: Rivers"),), "text")
    ]


def test_front_matter_is_left_out() -> None:
    source = "\ufeff---\r\ntitle: A\r\n---\r\ntext"
    assert texts(source) == [("", "text")]
    assert left_out(source) == {"byte-order mark": 3, "front matter": len("---\r\ntitle: A\r\n---\r\n")}


def test_a_rule_at_the_start_is_not_front_matter() -> None:
    source = "---\n\nProse.\n\n---\n\nMore."
    assert texts(source) == [("", source)]


def test_a_text_under_a_heading_has_no_front_matter() -> None:
    source = "---\nProse.\n\n---\nMore."
    parsed = parse_markdown(source, under=Heading(2, "A"))
    assert parsed.sections == [ParsedSection("A", 2, (), source)]
    assert parsed.total_bytes == len("A" + source)


def test_comments_are_left_out_even_over_headings_and_blank_lines() -> None:
    source = "one<!-- a --> two\n\n<!-- b\n\n## Old\n\n``` c -->\n\nthree <!----> four"
    assert texts(source) == [("", "one two\n\nthree  four")]
    assert left_out(source) == {"HTML comment": len("<!-- a --><!-- b\n\n## Old\n\n``` c --><!---->"), "white space": 2}


@pytest.mark.parametrize(
    "kept",
    [
        "x <!-- no end",
        "x <!-- no end\n\n```\n-->\n```\n\ny",
        "`<!-- a -->`",
        "`` <!-- a --> ``",
        "```html\n<!-- a -->\n```",
        "x\n\n    <!-- a -->",
        "<!--> x -->",
        "<!---> x -->",
    ],
)
def test_what_only_looks_like_a_comment_is_kept(kept: str) -> None:
    assert texts(kept) == [("", kept)]


def test_a_comment_without_end_ends_at_the_next_one_that_has_one() -> None:
    assert texts("a <!-- b <!-- c --> d <!-- e") == [("", "a  d <!-- e")]


def test_a_review_block_without_its_rule_is_kept() -> None:
    block = REVIEW.replace("---\n\n", "")
    assert texts(f"## A\n\n{block}Prose.\n\n## B\n\nx\n\n---\n\ny") == [
        ("A", block + "Prose."),
        ("B", "x\n\n---\n\ny"),
    ]


def test_a_rule_under_another_heading_does_not_end_a_review_block() -> None:
    source = "### Citation Accuracy Analysis\n\n0.5\n\n### Findings\n\nProse.\n\n---\n\nMore."
    assert texts(source) == [("", source)]


def test_a_rule_in_a_quote_or_list_does_not_end_a_review_block() -> None:
    assert texts("## A\n\n### Citation Accuracy Analysis\n\n> ---\n\n- ***\n\n---\n\nProse.") == [("A", "Prose.")]


def test_a_bibliography_within_a_review_block_ends_with_it() -> None:
    source = "## A\n\n### Citation Accuracy Analysis\n\n#### References\n\n[1] 0.5\n\n---\n\nProse."
    assert texts(source) == [("A", "Prose.")]


def test_a_review_block_is_recognized_by_its_title_at_any_depth_below_sections() -> None:
    assert texts("## A\n\n#### 1. citation accuracy  analysis:\n\n0.5\n\n***\n\nProse.\n\n---\n\nMore.") == [
        ("A", "Prose.\n\n---\n\nMore.")
    ]
    assert texts("## Citation Accuracy Analysis\n\nx\n\n---\n\ny") == [("Citation Accuracy Analysis", "x\n\n---\n\ny")]


def test_a_bibliography_ends_at_the_next_heading_of_its_level() -> None:
    source = (
        "## A\n\none\n\n### Works Cited\n\n[1]\n\n#### Books\n\n[2]\n\n### After\n\ntwo\n\n# 7. References:\n\n[3]\n\n"
        "## Primary\n\n[4]\n\n## Bibliography\n\n[5]\n\n# B\n\nthree"
    )
    assert texts(source) == [("A", "one\n\n### After\n\ntwo"), ("B", "three")]


def test_the_heading_above_a_text_may_mark_it_as_a_bibliography() -> None:
    parsed = parse_markdown("[1] Smith.\n\n## Notes\n\ntext", under=Heading(2, "REFERENCES"))
    assert parsed.sections == [ParsedSection("Notes", 2, (Heading(2, "REFERENCES"),), "text")]
    assert parsed.left_out == {"bibliography": len("[1] Smith.\n\n"), "heading marks": 4, "white space": 1}
    repeated = parse_markdown("## References\n\n[1] Smith.", under=Heading(2, "REFERENCES"))
    assert repeated.sections == []
    assert repeated.left_out == {"bibliography": 25, "heading without text": 10}


def test_bibliographies_and_review_blocks_are_kept_on_request() -> None:
    source = f"## A\n\n{REVIEW}Prose.\n\n## References\n\n[1]"
    assert texts(source, keep_bibliographies=True) == [("A", "Prose."), ("References", "[1]")]
    assert texts(source, keep_review_blocks=True) == [("A", REVIEW + "Prose.")]
    under = parse_markdown("[1]", under=Heading(2, "REFERENCES"), keep_bibliographies=True)
    assert under.sections == [ParsedSection("REFERENCES", 2, (), "[1]")]


def test_a_heading_that_repeats_the_one_above_it_is_kept_once() -> None:
    parsed = parse_markdown("# 2. background:\n\ntext\n\n## Background\n\nmore", under=Heading(2, "BACKGROUND"))
    assert parsed.sections == [
        ParsedSection("BACKGROUND", 2, (), "text"),
        ParsedSection("Background", 2, (), "more"),
    ]
    assert parsed.left_out == {"heading marks": len("# 2. background:\n## \n"), "white space": 4}


def test_invisible_white_space_is_left_out_except_in_code() -> None:
    source = (
        "\n\n  \none  \n\n\n\n\ntwo\t\n\n```\nx  \n\n\n\ny\n```\n\n\n\nthree\n\n\n    a \n\n\n    b\n\n\n\nfour \n\n"
    )
    kept = "one\n\ntwo\n\n```\nx  \n\n\n\ny\n```\n\nthree\n\n    a \n\n\n    b\n\nfour"
    assert texts(source) == [("", kept)]
    assert left_out(source) == {"white space": len(source) - len(kept)}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind_give_the_same_sections(end: str) -> None:
    source = "## A\n\none\ntwo\n\n```\ncode\n```\n\nB\n---\nthree\n"
    assert texts(source.replace("\n", end)) == [("A", "one\ntwo\n\n```\ncode\n```"), ("B", "three")]
    assert parse_markdown(source.replace("\n", end)).total_bytes == len(source.replace("\n", end))


def test_a_character_that_markdown_would_replace_is_unchanged() -> None:
    parsed = parse_markdown("## a\x00\n\nb\x00")
    assert parsed.sections == [ParsedSection("a\x00", 2, (), "b\x00")]
    assert parsed.left_out == {"heading marks": 4, "white space": 1}


def test_tables_footnotes_images_and_citations_are_text() -> None:
    source = "| a | b |\n|---|---|\n| 1 | 2 |\n\n![x](y.png) [@doi:10.1/2][^1]\n\n[^1]: Note\n[link]: http://x.y"
    assert texts(source) == [("", source)]


@pytest.mark.parametrize("source", ["", "\n", " \n\t\n", "\ufeff", "---\n---"])
def test_an_empty_text_has_no_sections(source: str) -> None:
    parsed = parse_markdown(source)
    assert parsed.sections == []
    assert parsed.total_bytes == len(source.encode())


def test_titles_are_compared_without_numbering_colon_case_and_blanks() -> None:
    assert normal_title(" 2.10. Straße  und\tWeg:: ") == "strasse und weg"
    assert normal_title("7 References") == normal_title("REFERENCES") == "references"
    assert normal_title("2019 Results") != normal_title("2020 Results")
    assert normal_title("") == normal_title(":") == ""


FRAGMENTS = st.sampled_from(
    [
        *("# ", "## ", "### ", "#", "\n===\n", "\n---\n", "---\n", "***\n", "- ", "> ", "    ", "\t", "  ", " "),
        *("\n", "\r\n", "\r", "\n\n", "\n\n\n\n", "\ufeff", "\x00", "\x0b", "\x0c", "\x85", "\u2028", "\u00a0"),
        *("```\n", "~~~\n", "```html\n", "`", "``", "<!--", "-->", "<!-- a -->", "<!-->", "<div>\n", "</div>\n\n"),
        *("title: x\n", "---\nkey: value\n---\n", "{#sec:a}", " {.b}\n", "| a | b |\n|---|---|\n| c | d |\n"),
        *("## References\n\n[1] x\n\n", "# Chapter 3\n", "### Citation Accuracy Analysis\n\nx\n", REVIEW),
        *("[1]: http://x.y\n", "[^1]: note\n", "é", "日本", "𝔘", "word ", "## BACKGROUND\n\n", "1. ", "...\n"),
    ]
)
SOURCES = st.lists(st.one_of(FRAGMENTS, FRAGMENTS, st.text(max_size=4)), max_size=30).map("".join)
UNDER = st.sampled_from([None, Heading(2, "BACKGROUND"), Heading(2, "References"), Heading(2, "é\x00")])


def is_subsequence(shorter: str, text: str) -> bool:
    characters = iter(text)
    return all(character in characters for character in shorter)


@settings(max_examples=200, deadline=None)
@given(SOURCES, UNDER, st.booleans(), st.booleans())
def test_every_byte_of_any_text_is_in_a_section_or_left_out_for_a_reason(
    source: str, under: Heading | None, bibliographies: bool, reviews: bool
) -> None:
    parsed = parse_markdown(source, under=under, keep_bibliographies=bibliographies, keep_review_blocks=reviews)
    above = len(under.title.encode()) if under else 0
    assert parsed.total_bytes == len(source.encode()) + above
    assert all(count > 0 for count in parsed.left_out.values())


@settings(max_examples=200, deadline=None)
@given(SOURCES)
def test_sections_are_any_text_with_parts_deleted_and_nothing_changed(source: str) -> None:
    parsed = parse_markdown(source)
    pieces = [
        piece
        for section in parsed.sections
        for piece in (*(heading.title for heading in section.lead), section.title, section.text)
    ]
    # A title over two lines is joined into one.
    flat = [re.sub(r"\s", " ", text) for text in ("".join(pieces), re.sub(r"\r\n?", "\n", source))]
    assert is_subsequence(*flat)
    assert all(section.text.strip("\n") == section.text != "" for section in parsed.sections)


@pytest.mark.parametrize(
    "source",
    [
        "## A\n\ntext\n\n" * 10_000,
        "## References\n\ntext\n\n" * 20_000,
        "### Citation Accuracy Analysis\n\ntext\n\n" * 20_000 + "---\n",
        "### Citation Accuracy Analysis\n\ntext\n\n---\n\n" * 20_000,
        "word " * 1_000_000,
        "a" + " " * 100_000 + "b",
        "## a" + " " * 100_000 + "b {#x} c",
        "a <!-- x " * 20_000,
        "a <!-- x\n\n" * 20_000,
        "[" * 20_000,
        "[\n" * 20_000,
        "[1]: http://x.y\n" * 20_000,
        "`" * 20_000 + "`a" * 20_000 + "<!-- x -->",
        ">" * 20_000 + "- " * 20_000,
        "{#" * 20_000,
    ],
    ids=lambda source: source[:12].strip(),
)
def test_parsing_time_is_proportional_to_the_length_of_any_text(source: str) -> None:
    start = process_time()
    assert parse_markdown(source).total_bytes == len(source)
    assert process_time() - start < 10  # it takes about 1 s; quadratic code takes longer than 10 s
