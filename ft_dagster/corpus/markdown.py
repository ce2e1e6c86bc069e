"""Splitting a Markdown text into sections, with an account of every byte that is not in them.

Cleaning only deletes: a section's title and text are what remains of the source after whole spans were removed.
Therefore the bytes of the source are exactly the bytes of the sections plus those counted under a reason.
"""

import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from operator import itemgetter

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.front_matter import front_matter_plugin

BOM = "﻿"
BIBLIOGRAPHY_TITLES = frozenset(
    {
        "references",
        "bibliography",
        "works cited",
        "literature cited",
        "reference list",
        "cited literature",
        "further reading",
        "endnotes",
    }
)
REVIEW_TITLE = "citation accuracy analysis"
_SECTION_LEVEL = 2
"""Headings down to this level start a section; deeper headings are part of its text."""
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_CARRIAGE_RETURN = re.compile(r"\r\n?")
_ATTRIBUTES = re.compile(r"(?<![ \t])[ \t]*\{[#.][^{}]*\}[ \t]*$")
_COMMENT = re.compile(r"(?P<code>`[^`\n]+`)|<!--(?!-?>).*?(?:-->|(?P<open>\Z))", re.DOTALL)
"""Matches an HTML comment, and also what looks like one but is kept: the content of a code span, and a comment without
an end."""
_LINE_END_SPACE = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
"""Here and in `_ATTRIBUTES`, the look-behind ensures that a long run of blanks is tried once, not at each character."""
_BLANK_LINES = re.compile(r"(\A\n|\n\n)\n+")
"""Matches more than one blank line, within a text or at its start, where the line before it is code."""
_CHAPTER_NUMBER = re.compile(r"chapter[ \t]+\d+\.?", re.IGNORECASE)
_NUMBERING = re.compile(r"^(?:\d{1,2}\.)*\d{0,2}[ \t]+")
"""Matches the numbering of a title, such as `7`, `7.` or `2.10`. A year is part of the title."""


def byte_length(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text.encode("utf-8", "surrogatepass"))


def normal_title(title: str) -> str:
    """Return a title for comparison: without numbering, trailing colon, case and repeated spaces.

    >>> normal_title("7. References:")
    'references'
    """
    return " ".join(_NUMBERING.sub("", title.strip()).rstrip(":").split()).casefold()


def compose(lead: Iterable[str], level: int, title: str, text: str) -> str:
    """Return a section as Markdown: the headings above it, its own heading if it has one, and its text.

    >>> compose(["# Report"], 2, "Costs", "They fell.")
    '# Report\\n\\n## Costs\\n\\nThey fell.'
    """
    own = [f"{'#' * level} {title}"] if level else []
    return "\n\n".join([*lead, *own, text])


@dataclass(frozen=True)
class Heading:
    """A Markdown heading."""

    level: int
    title: str

    def __str__(self) -> str:
        return f"{'#' * max(self.level, 1)} {self.title}"


@dataclass(frozen=True)
class ParsedSection:
    """One section of a source text, cleaned."""

    title: str
    """Title of the section; empty for text before the first heading."""
    level: int
    """Level of the heading; 0 for text before the first heading."""
    lead: tuple[Heading, ...]
    """Headings directly above this one that have no text of their own, such as a chapter's title."""
    text: str

    @property
    def kept_bytes(self) -> int:
        """Bytes of the source that the section keeps: titles and text, without heading marks."""
        return byte_length(self.title) + sum(byte_length(h.title) for h in self.lead) + byte_length(self.text)


@dataclass
class ParsedText:
    """The result of parsing a text: its sections, and the bytes left out by reason. Together they are the full text."""

    sections: list[ParsedSection] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def total_bytes(self) -> int:
        return sum(section.kept_bytes for section in self.sections) + sum(self.left_out.values())


def parse_markdown(
    source: str,
    *,
    under: Heading | None = None,
    keep_bibliographies: bool = False,
    keep_review_blocks: bool = False,
) -> ParsedText:
    """Split a Markdown text into sections at headings of level 1 and 2, and clean it.

    The following are left out and counted: front matter, review blocks, bibliographies, HTML comments, heading marks
    and attributes, carriage returns at line ends, trailing and repeated white space, a byte-order mark, and
    `# Chapter <N>` headings.

    Args:
        source: the decoded text with its original line ends.
        under: a heading above the text that is not part of it (a JSON section's name). Its title counts as bytes of
            the first section.
        keep_bibliographies: whether bibliographies are kept as text.
        keep_review_blocks: whether review blocks are kept as text.

    Returns:
        A ParsedText whose `total_bytes` is the byte length of `source` (plus that of the title of `under`).
    """
    return _Reader(source, under, keep_bibliographies, keep_review_blocks).read()


@cache
def _block_parser(front_matter: bool) -> MarkdownIt:
    """Return markdown-it without its inline rules: only the block structure and its line numbers are needed."""
    parser = MarkdownIt("commonmark").enable("table")
    if front_matter:
        parser.use(front_matter_plugin)
    parser.core.ruler.enableOnly(["block"])
    return parser


class _Reader:
    """Reads the source line by line. Every line is either kept or counted under a reason, exactly once."""

    def __init__(self, source: str, under: Heading | None, keep_bibliographies: bool, keep_review: bool) -> None:
        self.out = ParsedText()
        if source.startswith(BOM):
            self._leave_out(BOM, "byte-order mark")
            source = source[1:]
        self.lines = [line for line in _LINE.findall(source) if line]
        # Only a file can have front matter, and a `---` above a blank line is a thematic break, not front matter.
        front_matter = under is None and bool("".join(self.lines[1:2]).strip())
        tokens = _block_parser(front_matter).parse(_CARRIAGE_RETURN.sub("\n", source))
        self.headings: dict[int, tuple[int, Heading]] = {}  # first line -> (line after the last, heading)
        self.code: set[int] = set()  # lines of code, in which white space and comments are text
        self.dropped: dict[int, str] = {}  # line -> reason
        self.under = under
        self._find_blocks(tokens, keep_bibliographies, keep_review)
        self.lead: list[Heading] = []
        self.heading: Heading | None = under
        self.body: list[tuple[str, bool]] = []  # (line, whether it is code)

    def _find_blocks(self, tokens: list[Token], keep_bibliographies: bool, keep_review: bool) -> None:
        rules: list[int] = []
        for index, token in enumerate(tokens):
            if token.map is None:
                continue
            first, after = token.map
            if token.type == "heading_open" and token.level == 0:
                title = _ATTRIBUTES.sub("", tokens[index + 1].content.replace("\n", " "))
                self.headings[first] = (after, Heading(int(token.tag[1]), title))
            elif token.type == "hr" and token.level == 0:
                rules.append(first)
            elif token.type in ("fence", "code_block"):
                self.code.update(range(first, after))
            elif token.type == "front_matter":
                self._drop(first, after, "front matter")
        if not keep_review:
            self._find_review_blocks(rules)
        if not keep_bibliographies:
            self._find_bibliographies()

    def _find_review_blocks(self, rules: list[int]) -> None:
        """Drop each review block, from its heading to its `---`.

        A heading without a `---` before the next heading of its level or a higher one does not start a review block.
        """
        for first, heading, end in self._parts():
            if heading.level > _SECTION_LEVEL and normal_title(heading.title) == REVIEW_TITLE:
                rule = bisect(rules, first)
                if rule < len(rules) and rules[rule] < end:
                    self._drop(first, rules[rule] + 1, "review block")

    def _find_bibliographies(self) -> None:
        for first, heading, end in self._parts():
            if first not in self.dropped and normal_title(heading.title) in BIBLIOGRAPHY_TITLES:
                self._drop(max(first, 0), end, "bibliography")

    def _parts(self) -> list[tuple[int, Heading, int]]:
        """Return (first line, heading, line where the next heading of its level or a higher one starts), in order.

        The heading above the text, `under`, has line -1.
        """
        headings = [(-1, self.under)] if self.under else []
        headings += [(first, heading) for first, (_, heading) in self.headings.items()]
        parts = []
        after = [len(self.lines)] * 7  # level -> where the next heading of this level or a higher one starts
        for first, heading in reversed(headings):
            parts.append((first, heading, after[heading.level]))
            after[heading.level :] = [first] * (7 - heading.level)
        return parts[::-1]

    def _drop(self, first: int, after: int, reason: str) -> None:
        for line in range(first, after):
            self.dropped.setdefault(line, reason)

    def _leave_out(self, text: str, reason: str) -> None:
        if text:
            self.out.left_out[reason] += byte_length(text)

    def read(self) -> ParsedText:
        line = 0
        while line < len(self.lines):
            if line in self.dropped:
                self._leave_out(self.lines[line], self.dropped[line])
            elif line in self.headings:
                line = self._read_heading(line)
                continue
            else:
                self._read_line(line)
            line += 1
        self._close_section()
        for heading in (*self.lead, *([self.heading] if self.heading else [])):
            self._leave_out(heading.title, "heading without text")
        self.out.left_out = +self.out.left_out
        return self.out

    def _read_heading(self, first: int) -> int:
        after, heading = self.headings[first]
        source = "".join(self.lines[first:after])
        if heading.level > _SECTION_LEVEL:
            for line in range(first, after):
                self._read_line(line)
            return after
        self._close_section()
        repeats_name = self.under is not None and normal_title(heading.title) == normal_title(self.under.title)
        if repeats_name and self.heading is self.under and not self.lead:
            self._leave_out(source, "heading marks")  # the text repeats the name of its section
            return after
        self.out.left_out["heading marks"] += byte_length(source) - byte_length(heading.title)
        if heading.level == 1 and _CHAPTER_NUMBER.fullmatch(heading.title.strip()):
            self._leave_out(heading.title, "chapter number")
            return after
        if self.heading is not None:
            self.lead.append(self.heading)
        self.heading = heading
        return after

    def _read_line(self, number: int) -> None:
        line = self.lines[number]
        content = line.rstrip("\r\n")
        end = line[len(content) :]
        if end == "\r\n":
            self._leave_out("\r", "line ends")
        if number in self.headings:
            content = self._keep(_ATTRIBUTES.sub("", content), content, "heading attributes")
        self.body.append((content + ("\n" if end else ""), number in self.code))

    def _close_section(self) -> None:
        """Turn the body read so far into a section if it contains text."""
        text = "".join(
            piece if is_code else self._clean_prose(piece)
            for is_code, piece in (
                (is_code, "".join(line for line, _ in lines)) for is_code, lines in groupby(self.body, itemgetter(1))
            )
        )
        self.body = []
        text = self._keep(text.strip("\n"), text, "white space")
        if text:
            heading = self.heading or Heading(0, "")
            self.out.sections.append(ParsedSection(heading.title, heading.level, tuple(self.lead), text))
            self.lead, self.heading = [], None

    def _clean_prose(self, text: str) -> str:
        """Return prose without HTML comments, white space at line ends, and repeated blank lines."""
        if "<!--" in text:
            text = self._keep(_COMMENT.sub(_without_comment, text), text, "HTML comment")
        return self._keep(_BLANK_LINES.sub(r"\1", _LINE_END_SPACE.sub("", text)), text, "white space")

    def _keep(self, shorter: str, text: str, reason: str) -> str:
        """Return `shorter`, which is `text` after deletions, and count the deleted bytes under the reason."""
        self.out.left_out[reason] += byte_length(text) - byte_length(shorter)
        return shorter


def _without_comment(match: re.Match[str]) -> str:
    return match[0] if match["code"] or match["open"] is not None else ""
