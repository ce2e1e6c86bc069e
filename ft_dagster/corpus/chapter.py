"""Reading the files of one chapter into its sections: one version of each section, in reading order."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.files import SourceFile, Unreadable, decode
from ft_dagster.corpus.ledger import FileLedger
from ft_dagster.corpus.markdown import Heading, ParsedSection, byte_length, compose, normal_title, parse_markdown
from ft_dagster.corpus.pairs import Pair, make_pair
from ft_dagster.corpus.report_json import JsonText, parse_report_json
from ft_dagster.store.hashing import digest

ReadBytes = Callable[[SourceFile], bytes]


@dataclass(frozen=True)
class Section:
    """One section of one chapter."""

    chapter: str
    """Name that identifies the chapter: its path within its report folder, without suffix."""
    title: str
    level: int
    lead: tuple[str, ...]
    """Markdown headings directly above the section that have no text of their own."""
    text: str
    source: str
    """The file that the section comes from, relative to the workspace."""
    hash: str
    """SHA-256 of what a reader sees: lead, title, level and text."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the source that the section uses: titles and text. Heading marks are counted separately."""
        lead = sum(byte_length(heading.split(" ", 1)[1]) for heading in self.lead)
        return lead + byte_length(self.title) + byte_length(self.text)

    @property
    def markdown(self) -> str:
        """The section as Markdown: the headings above it, its own heading, and its text."""
        return compose(self.lead, self.level, self.title, self.text)


@dataclass(frozen=True)
class _Candidate:
    """A section of one file, before it is decided whether it is used."""

    parsed: ParsedSection
    file: int
    """Index of the ledger of its file in `Chapter.files`."""
    rank: tuple[int, str]
    """Of two versions, the one with the higher rank is used: improved JSON ranks above Markdown, Markdown above drafts,
    and a later version above an earlier one."""
    place: int
    json_title: str | None = None
    """Name of the JSON section that the text is (a part of), normalized for comparison; None for Markdown."""
    json_text: JsonText | None = None
    """The JSON section, if it states what it was rewritten from."""
    unwanted: str | None = None
    """Why the section is not used even if no other version replaces it."""


@dataclass
class Chapter:
    """One chapter: its sections in reading order, and an account of every byte of its files."""

    name: str
    sections: list[Section] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    """Pairs of original and improved text, where reports contain them, in the order of the sections."""
    files: list[FileLedger] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    """Reason -> number of sections removed."""

    def remove(self, indices: Collection[int], reason: str) -> None:
        """Remove sections. Their bytes are left out for this reason, and their pairs are no longer whole."""
        if not indices:
            return
        ledgers = {ledger.path: ledger for ledger in self.files}
        for index in indices:
            section = self.sections[index]
            ledgers[section.source].move(section.used_bytes, reason)
            self.removed[reason] += 1
        kept = [index for index in range(len(self.sections)) if index not in indices]
        places = {index: place for place, index in enumerate(kept)}
        self.pairs = [
            replace(
                pair,
                sections=tuple(places[index] for index in pair.sections if index in places),
                whole=pair.whole and places.keys() >= set(pair.sections),
            )
            for pair in self.pairs
        ]
        self.sections = [self.sections[index] for index in kept]


def read_chapter(name: str, files: Iterable[SourceFile], read: ReadBytes, options: Corpus) -> Chapter:
    """Read one chapter from all files that belong to it.

    Of a section that exists in several versions (in Markdown and JSON, or in two JSON files), one version is used. The
    ledgers record what is not used, to the byte.

    Args:
        name: the name of the chapter.
        files: the files that belong to the chapter.
        read: returns the bytes of a file.
        options: the recipe's options for the corpus.

    Raises:
        LedgerError: the bytes do not add up.
    """
    chapter = Chapter(name)
    members = sorted(files, key=lambda file: natural_key(file.path))
    candidates = [c for file in members for c in _read_file(file, read(file), options, chapter)]
    places: dict[int, int] = {}  # id of a candidate -> index of its section
    for candidate in _one_version_each(_newest_in_json(candidates, chapter), chapter):
        if candidate.unwanted:
            _remove(candidate, chapter, candidate.unwanted)
        else:
            places[id(candidate)] = len(chapter.sections)
            chapter.sections.append(_section(name, candidate, chapter.files[candidate.file].path))
    chapter.pairs = sorted(_pairs(candidates, places, chapter, options), key=lambda pair: pair.sections)
    for ledger in chapter.files:
        ledger.check()
    return chapter


def why_unreadable(file: SourceFile, data: bytes) -> str | None:
    """Return why `read_chapter` cannot use a file, without parsing its text; None if it can."""
    try:
        decode(data) if file.kind == "markdown" else parse_report_json(data, file.name)
    except ValueError as error:
        return str(error)
    return None


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts chapter_2 before chapter_10. Different names have different keys."""
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    # Without leading zeros, the larger of two numbers is the one with more digits.
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)], name


def _read_file(file: SourceFile, data: bytes, options: Corpus, chapter: Chapter) -> list[_Candidate]:
    """Return the sections of one file, and record all other bytes in its ledger."""
    ledger = FileLedger(file.path, file.size)
    index = len(chapter.files)
    chapter.files.append(ledger)
    try:
        found = list(_candidates(file, data, options, ledger, index))
    except ValueError as error:
        chapter.files[index] = _unreadable_ledger(Unreadable(file.path, str(error), file.size))
        return []
    ledger.used = sum(candidate.parsed.kept_bytes for candidate in found)
    return found


def _candidates(file: SourceFile, data: bytes, options: Corpus, ledger: FileLedger, index: int) -> Iterator[_Candidate]:
    keep = _parse_options(options)
    if file.kind == "markdown":
        parsed = parse_markdown(decode(data), **keep)
        ledger.left_out.update(parsed.left_out)
        for place, section in enumerate(parsed.sections):
            yield _Candidate(section, index, (1, ""), place)
        return
    report = parse_report_json(data, file.name)
    ledger.left_out.update(report.left_out)
    for text in report.texts:
        if text.kind == "draft" and not options.drafts:
            ledger.left_out["draft"] += byte_length(text.title) + byte_length(text.text)
            continue
        parsed = parse_markdown(text.text, under=Heading(2, text.title), **keep)
        ledger.left_out.update(parsed.left_out)
        rank = (2 if text.kind == "improved" else 0, text.timestamp)
        rewritten = text if text.original is not None else None
        unwanted = _unwanted(text.score, options)
        for section in parsed.sections:
            yield _Candidate(section, index, rank, text.place, normal_title(text.title), rewritten, unwanted)


def _parse_options(options: Corpus) -> dict[str, Any]:
    """Return the options of `parse_markdown` that the recipe sets: what is kept as text."""
    return {"keep_bibliographies": options.bibliographies, "keep_review_blocks": options.review_blocks}


def _unwanted(score: float | None, options: Corpus) -> str | None:
    """Return why a text with this score is not used, if so.

    The text remains a candidate all the same: otherwise its copy in Markdown, which has no score, would be used.
    """
    if options.minimum_score is not None and score is not None and score < options.minimum_score:
        return "score below the recipe's minimum"
    return None


def _newest_in_json(candidates: list[_Candidate], chapter: Chapter) -> list[_Candidate]:
    """Return the candidates of Markdown files, and those of the newest version of each JSON section.

    An older version is removed as a whole, because it may have had headings that the newest one no longer has.
    """

    def version(candidate: _Candidate) -> tuple[tuple[int, str], str]:
        return candidate.rank, chapter.files[candidate.file].path

    newest: dict[str, _Candidate] = {}
    for candidate in candidates:
        if candidate.json_title is not None:
            other = newest.setdefault(candidate.json_title, candidate)
            newest[candidate.json_title] = max(other, candidate, key=version)
    kept = []
    for candidate in candidates:
        winner = candidate if candidate.json_title is None else newest[candidate.json_title]
        if winner.file == candidate.file and winner.rank == candidate.rank:
            kept.append(candidate)
        else:
            _remove(candidate, chapter, _REPLACED[(candidate.rank[0], winner.rank[0])])
    return kept


def _one_version_each(candidates: list[_Candidate], chapter: Chapter) -> list[_Candidate]:
    """Return the candidates that are used, in reading order: a section has the position of its first version.

    Versions of a section have the same title in the same part of the chapter. Each JSON section is a part. Markdown
    does not distinguish such parts from headings within them, so in Markdown a part starts at each heading that is also
    the name of a JSON section.
    """
    names = {candidate.json_title for candidate in candidates}
    parts: dict[int, str] = {}  # index of a Markdown file -> part that is being read
    versions: dict[tuple[str, str, int], _Candidate] = {}
    nth: Counter[tuple[int, str, str]] = Counter()
    # Markdown comes first, because its order is the most reliable.
    for candidate in sorted(candidates, key=lambda c: (c.rank[0] != 1, c.place)):
        title = normal_title(candidate.parsed.title)
        if candidate.json_title is None:
            for above in (*(normal_title(heading.title) for heading in candidate.parsed.lead), title):
                if above in names:
                    parts[candidate.file] = above
            source, part = candidate.file, parts.get(candidate.file, "")
        else:
            source, part = -1, candidate.json_title  # all JSON files together are one version of the chapter
        key = (part, title, nth[source, part, title])  # a part may contain the same title twice
        nth[source, part, title] += 1
        other = versions.setdefault(key, candidate)
        if other is not candidate:
            loser, winner = sorted((other, candidate), key=lambda c: (c.rank, chapter.files[c.file].path))
            versions[key] = winner
            _remove(loser, chapter, _REPLACED[(loser.rank[0], winner.rank[0])])
    return list(versions.values())


_REPLACED = {
    (0, 0): "older version",
    (0, 1): "draft of a section that exists",
    (0, 2): "draft of a section that exists",
    (1, 1): "older version",
    (1, 2): "improved version in JSON",
    (2, 2): "older version",
}


def _remove(candidate: _Candidate, chapter: Chapter, reason: str) -> None:
    chapter.removed[reason] += 1
    chapter.files[candidate.file].move(candidate.parsed.kept_bytes, reason)


def _section(chapter: str, candidate: _Candidate, source: str) -> Section:
    parsed = candidate.parsed
    lead = tuple(str(heading) for heading in parsed.lead)
    content = digest([lead, parsed.title, parsed.level, parsed.text])
    return Section(chapter, parsed.title, parsed.level, lead, parsed.text, source, content)


def _pairs(
    candidates: Iterable[_Candidate], places: Mapping[int, int], chapter: Chapter, options: Corpus
) -> Iterator[Pair]:
    """Yield the pairs of JSON sections whose text is used in full. The candidates are in the order of their files."""
    parts: dict[tuple[int, int], list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.json_text is not None:
            parts[candidate.file, candidate.place].append(candidate)
    for (file, _), members in parts.items():
        text = members[0].json_text
        if text is not None and all(id(member) in places for member in members):
            sections = tuple(places[id(member)] for member in members)
            improved = "\n\n".join(chapter.sections[place].markdown for place in sections)
            if pair := make_pair(text, improved, sections, chapter.files[file].path, _parse_options(options)):
                yield pair


def _unreadable_ledger(item: Unreadable) -> FileLedger:
    reason = {"unreadable file": item.size} if item.size else {}
    return FileLedger(item.path, item.size, left_out=Counter(reason), problem=item.reason)
