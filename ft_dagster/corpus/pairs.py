"""Pairs of an original and an improved text, as recorded by the reviews of the report generator."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ft_dagster.corpus.markdown import Heading, compose, parse_markdown
from ft_dagster.corpus.report_json import JsonText
from ft_dagster.store.hashing import digest


@dataclass(frozen=True)
class Pair:
    """A section of a JSON report before it was rewritten, and the text that is used."""

    title: str
    """Name of the section in the report."""
    original: str
    """The original text as Markdown, cleaned in the same way as sections."""
    improved: str
    """The improved text as Markdown: the sections that it was split into, one after the other."""
    brief: tuple[str, ...]
    """The points that the editor asked to improve."""
    source: str
    """The file that the pair comes from, relative to the workspace."""
    sections: tuple[int, ...]
    """Indices of the sections of the chapter that contain the improved text, in order."""
    whole: bool = True
    """Whether the chapter has all of these sections: one may have been removed as a duplicate of another text."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what a model reads and writes: original, brief and improved text."""
        return digest([self.original, self.brief, self.improved])


def make_pair(
    text: JsonText, improved: str, sections: tuple[int, ...], source: str, keep: Mapping[str, bool]
) -> Pair | None:
    """Return the pair of a JSON section whose improved text is used, or None if nothing was rewritten.

    Args:
        text: the section as the file contains it.
        improved: the text that is used, as Markdown.
        sections: indices of the sections of the chapter that contain the improved text.
        source: the file, relative to the workspace.
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
