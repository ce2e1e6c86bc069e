"""Pairs of an original and an improved text, as the report generator's reviews leave them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ft_dagster.corpus.markdown import Heading, compose, parse_markdown
from ft_dagster.corpus.report_json import JsonText
from ft_dagster.store.hashing import digest


@dataclass(frozen=True)
class Pair:
    """A section of a JSON report as it was before it was rewritten, and as it is used."""

    title: str
    """The section's name in the report."""
    original: str
    """Markdown, cleaned as sections are."""
    improved: str
    """Markdown: the sections that the rewritten text became, one after the other."""
    brief: tuple[str, ...]
    """What the editor asked to improve."""
    source: str
    """The file it comes from, relative to the workspace."""
    sections: tuple[int, ...]
    """Which sections of the chapter hold the improved text, in its order."""
    whole: bool = True
    """Whether the chapter has all of them: one may have been taken out because its text stands elsewhere."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what a model would read and write: original, brief and improved text."""
        return digest([self.original, self.brief, self.improved])


def make_pair(
    text: JsonText, improved: str, sections: tuple[int, ...], source: str, keep: Mapping[str, bool]
) -> Pair | None:
    """The pair of a JSON section whose improved text is used; None if nothing was rewritten.

    Args:
        text: the section as the file has it.
        improved: what is used of it, as Markdown.
        sections: the sections of the chapter that this is.
        source: the file.
        keep: the options of `parse_markdown` that the improved text was cleaned with.
    """
    if text.original is None:
        return None
    parsed = parse_markdown(text.original, under=Heading(2, text.title), **keep)
    parts = [compose(map(str, part.lead), part.level, part.title, part.text) for part in parsed.sections]
    original = "\n\n".join(parts)
    if not original or original == improved:
        return None
    return Pair(text.title, original, improved, text.brief, source, sections)
