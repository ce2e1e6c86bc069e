"""The files of one chapter -> the sections that count: one version of each, in reading order."""

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
    """Identity of the chapter: its path within its report folder, without suffix."""
    title: str
    level: int
    lead: tuple[str, ...]
    """Markdown headings without text of their own that stand right above it."""
    text: str
    source: str
    """The file it comes from, relative to the workspace."""
    hash: str
    """SHA-256 of what a reader would see: lead, title, level and text."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the source that it holds: titles and text; the marks of headings are counted elsewhere."""
        lead = sum(byte_length(heading.split(" ", 1)[1]) for heading in self.lead)
        return lead + byte_length(self.title) + byte_length(self.text)

    @property
    def markdown(self) -> str:
        """The section as it is read: headings above it, its own heading, and its text."""
        return compose(self.lead, self.level, self.title, self.text)


@dataclass(frozen=True)
class _Candidate:
    """A section of one file, before it is known whether it is used."""

    parsed: ParsedSection
    file: int
    """Index of its file's ledger."""
    rank: tuple[int, str]
    """Which of two versions counts: the higher one. Improved JSON over Markdown over drafts, later over earlier."""
    place: int
    json_title: str | None = None
    """For comparison, the name of the JSON section whose text this is (a part of)."""
    json_text: JsonText | None = None
    """That section, if it says what it was rewritten from."""
    unwanted: str | None = None
    """Why it is not used even if no other version replaces it."""


@dataclass
class Chapter:
    """One chapter: its sections in reading order, and what became of every byte of its files."""

    name: str
    sections: list[Section] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    """What sections were rewritten from, where reports say so; in the order of the sections."""
    files: list[FileLedger] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    """Reason -> sections removed whole."""

    def remove(self, indices: Collection[int], reason: str) -> None:
        """Take sections out again; their bytes are left out for this reason, and their pairs are not whole any more."""
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
    """The sections of one chapter, from all files that speak of it.

    Of a section that exists in several versions (Markdown and JSON, two JSON files) one is used. What is not used
    stands in the ledgers, to the byte.

    Args:
        name: the chapter's.
        files: those that speak of it.
        read: gives a file's bytes.
        options: the recipe's part for the corpus.

    Raises:
        LedgerError: bytes do not add up.
    """
    chapter = Chapter(name)
    members = sorted(files, key=lambda file: natural_key(file.path))
    candidates = [c for file in members for c in _read_file(file, read(file), options, chapter)]
    places: dict[int, int] = {}  # id of a candidate -> place of its section
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


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts chapter_2 before chapter_10; different names have different keys."""
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    # Of two numbers, the one with more digits is the larger one.
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)], name


def _read_file(file: SourceFile, data: bytes, options: Corpus, chapter: Chapter) -> list[_Candidate]:
    """The sections of one file; everything else in it goes to its ledger."""
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
    keep = _kept(options)
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


def _kept(options: Corpus) -> dict[str, Any]:
    """What the recipe keeps as text, for `parse_markdown`."""
    return {"keep_bibliographies": options.bibliographies, "keep_review_blocks": options.review_blocks}


def _unwanted(score: float | None, options: Corpus) -> str | None:
    """The text stays a candidate, or its copy in Markdown, which has no score, would be used."""
    if options.minimum_score is not None and score is not None and score < options.minimum_score:
        return "score below the recipe's minimum"
    return None


def _newest_in_json(candidates: list[_Candidate], chapter: Chapter) -> list[_Candidate]:
    """Without older versions of whole JSON sections, which may have had headings that the newest no longer has."""

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
    """The candidates that are used, in reading order: the first version's place is the section's place.

    Versions of one section have the same title in the same part of the chapter. A JSON section is a part; Markdown
    does not tell such parts from headings within them, so there a part begins at a heading that a JSON section has.
    """
    names = {candidate.json_title for candidate in candidates}
    parts: dict[int, str] = {}  # Markdown file -> part that is being read
    versions: dict[tuple[str, str, int], _Candidate] = {}
    nth: Counter[tuple[int, str, str]] = Counter()
    for candidate in sorted(candidates, key=lambda c: (c.rank[0] != 1, c.place)):  # Markdown knows the order best
        title = normal_title(candidate.parsed.title)
        if candidate.json_title is None:
            for above in (*(normal_title(heading.title) for heading in candidate.parsed.lead), title):
                if above in names:
                    parts[candidate.file] = above
            source, part = candidate.file, parts.get(candidate.file, "")
        else:
            source, part = -1, candidate.json_title  # all JSON files together are one version of the chapter
        key = (part, title, nth[source, part, title])  # a part may use one title twice
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
    """The pairs of JSON sections all of whose text is used; of candidates as they stand in their files."""
    parts: dict[tuple[int, int], list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.json_text is not None:
            parts[candidate.file, candidate.place].append(candidate)
    for (file, _), members in parts.items():
        text = members[0].json_text
        if text is not None and all(id(member) in places for member in members):
            sections = tuple(places[id(member)] for member in members)
            improved = "\n\n".join(chapter.sections[place].markdown for place in sections)
            if pair := make_pair(text, improved, sections, chapter.files[file].path, _kept(options)):
                yield pair


def _unreadable_ledger(item: Unreadable) -> FileLedger:
    reason = {"unreadable file": item.size} if item.size else {}
    return FileLedger(item.path, item.size, left_out=Counter(reason), problem=item.reason)
