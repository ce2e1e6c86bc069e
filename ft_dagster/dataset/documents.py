"""Sections as documents: the text that a model reads, and the positions where it may be cut."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ft_dagster.corpus.chapter import Section

_FENCE = re.compile(r" {0,3}(```+(?!.*`)|~~~+)")  # backticks later in the line: a code span, not a fence
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]")


@dataclass(frozen=True)
class Breaks:
    """Character positions where a document may be cut, best first: before headings, before paragraphs, before lines."""

    headings: list[int]
    paragraphs: list[int]
    lines: list[int]


def render(section: Section) -> str:
    """Return the text of a section as a Markdown document: the headings above it, its own heading, and its text.

    >>> render(Section("a", "Costs", 2, ("# Report",), "They fell.", "a.md", ""))
    '# Report\\n\\n## Costs\\n\\nThey fell.'
    """
    return section.markdown


def source_spans(section: Section) -> list[tuple[int, int]]:
    """Return the spans of the titles and the text in the rendered text: all but heading marks and the lines between.

    >>> source_spans(Section("a", "Costs", 2, ("# Report",), "They fell.", "a.md", ""))
    [(2, 8), (13, 18), (20, 30)]
    """
    spans = []
    start = 0
    for heading in (*section.lead, *([f"{'#' * section.level} {section.title}"] if section.level else [])):
        spans.append((start + heading.index(" ") + 1, start + len(heading)))
        start += len(heading) + len("\n\n")
    return [*spans, (start, start + len(section.text))]


def find_breaks(text: str) -> Breaks:
    """Return the positions where a document may be cut. Inside a code fence, only line starts count."""
    breaks = Breaks([], [], [])
    after_blank = False
    for start, line, fenced in _lines(text):
        if start:
            if not fenced and _HEADING.match(line):
                breaks.headings.append(start)
            elif not fenced and after_blank and line.strip():
                breaks.paragraphs.append(start)
            else:
                breaks.lines.append(start)
        after_blank = not line.strip()
    return breaks


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the position of each line, the line, and whether it is inside a code fence."""
    start = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line)
        yield start, line, bool(fence)
        if match and not fence:
            fence = match[1]
        elif match and match[1][0] == fence[0] and len(match[1]) >= len(fence) and line.strip() == match[1]:
            fence = ""
        start += len(line)
