"""Chapters -> the sections that count: one version of each, each text once, in reading order."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ft_dagster.corpus.files import SourceFile, Unreadable, decode
from ft_dagster.corpus.ledger import FileLedger
from ft_dagster.corpus.markdown import Heading, ParsedSection, byte_length, normal_title, parse_markdown
from ft_dagster.corpus.report_json import parse_report_json
from ft_dagster.recipe import Corpus
from ft_dagster.store import digest

CODE_VERSION = "1"
"""Raised by hand when the same files would give other sections."""

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
    order: int
    """Position in the chapter, from 0."""
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

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Section":
        fields = json.loads(line)
        return cls(**fields | {"lead": tuple(fields["lead"])})


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
    unwanted: str | None = None
    """Why it is not used even if no other version replaces it."""


@dataclass
class SectionsReport:
    """What became of every file. Filled while the sections are read; complete when they have all been read."""

    files: list[FileLedger] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    """Reason -> sections removed whole."""
    chapters: int = 0
    sections: int = 0
    words: int = 0


def read_sections(
    files: Iterable[SourceFile],
    unreadable: Iterable[Unreadable],
    read: ReadBytes,
    options: Corpus,
    report: SectionsReport,
) -> Iterator[Section]:
    """The sections of all chapters, chapter by chapter, in an order that depends on names only.

    Of a section that exists in several versions (Markdown and JSON, two JSON files) one is used; the same text in
    two places is used at its first place. What is not used stands in the report, to the byte. Only one chapter's
    text is in memory at a time.

    Args:
        files: what there is to read.
        unreadable: what is known beforehand to be unreadable.
        read: gives a file's bytes.
        options: the recipe's part for the corpus.
        report: filled on the way.

    Raises:
        LedgerError: bytes do not add up.
    """
    report.unreadable.extend(unreadable)
    for item in report.unreadable:
        report.files.append(_unreadable_ledger(item))
    seen: set[str] = set()
    for chapter, members in sorted(_group(files, read).items(), key=lambda item: natural_key(item[0])):
        members.sort(key=lambda file: natural_key(file.path))
        candidates = [c for file in members for c in _read_file(file, read(file), options, report)]
        used = 0
        for candidate in _one_version_each(_newest_in_json(candidates, report), report):
            if candidate.unwanted:
                _remove(candidate, report, candidate.unwanted)
                continue
            section = _section(chapter, used, candidate, report.files[candidate.file].path)
            if (fingerprint := digest(section.text.encode())) in seen:
                _remove(candidate, report, "exact duplicate")
                continue
            seen.add(fingerprint)
            used += 1
            report.sections += 1
            report.words += len(section.text.split())
            yield section
        report.chapters += bool(used)
    for ledger in report.files:
        ledger.check()


def content_version(sections: Iterable[Section]) -> str:
    """The data version of sections: chapter, order and content of each; not where they were read from."""
    return digest([[section.chapter, section.order, section.hash] for section in sections])


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts chapter_2 before chapter_10; different names have different keys."""
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
    # Of two numbers, the one with more digits is the larger one.
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)], name


def _group(files: Iterable[SourceFile], read: ReadBytes) -> dict[str, list[SourceFile]]:
    """Files by the chapter they speak of. A JSON file may name its chapter inside, so it is parsed for that."""
    groups: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        chapter = file.name
        if file.kind == "json":
            with suppress(ValueError):  # reported by name when it is read for its text
                chapter = parse_report_json(read(file), file.name).chapter
        groups[chapter].append(file)
    return groups


def _read_file(file: SourceFile, data: bytes, options: Corpus, report: SectionsReport) -> list[_Candidate]:
    """The sections of one file; everything else in it goes to its ledger."""
    ledger = FileLedger(file.path, file.size)
    index = len(report.files)
    report.files.append(ledger)
    try:
        found = list(_candidates(file, data, options, ledger, index))
    except ValueError as error:
        report.unreadable.append(Unreadable(file.path, str(error), file.size))
        report.files[index] = _unreadable_ledger(report.unreadable[-1])
        return []
    ledger.used = sum(candidate.parsed.kept_bytes for candidate in found)
    return found


def _candidates(file: SourceFile, data: bytes, options: Corpus, ledger: FileLedger, index: int) -> Iterator[_Candidate]:
    keep: dict[str, Any] = {"keep_bibliographies": options.bibliographies, "keep_review_blocks": options.review_blocks}
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
        for section in parsed.sections:
            yield _Candidate(section, index, rank, text.place, normal_title(text.title), _unwanted(text.score, options))


def _unwanted(score: float | None, options: Corpus) -> str | None:
    """The text stays a candidate, or its copy in Markdown, which has no score, would be used."""
    if options.minimum_score is not None and score is not None and score < options.minimum_score:
        return "score below the recipe's minimum"
    return None


def _newest_in_json(candidates: list[_Candidate], report: SectionsReport) -> list[_Candidate]:
    """Without older versions of whole JSON sections, which may have had headings that the newest no longer has."""

    def version(candidate: _Candidate) -> tuple[tuple[int, str], str]:
        return candidate.rank, report.files[candidate.file].path

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
            _remove(candidate, report, _REPLACED[(candidate.rank[0], winner.rank[0])])
    return kept


def _one_version_each(candidates: list[_Candidate], report: SectionsReport) -> list[_Candidate]:
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
            loser, winner = sorted((other, candidate), key=lambda c: (c.rank, report.files[c.file].path))
            versions[key] = winner
            _remove(loser, report, _REPLACED[(loser.rank[0], winner.rank[0])])
    return list(versions.values())


_REPLACED = {
    (0, 0): "older version",
    (0, 1): "draft of a section that exists",
    (0, 2): "draft of a section that exists",
    (1, 1): "older version",
    (1, 2): "improved version in JSON",
    (2, 2): "older version",
}


def _remove(candidate: _Candidate, report: SectionsReport, reason: str) -> None:
    report.removed[reason] += 1
    report.files[candidate.file].move(candidate.parsed.kept_bytes, reason)


def _section(chapter: str, order: int, candidate: _Candidate, source: str) -> Section:
    parsed = candidate.parsed
    lead = tuple(str(heading) for heading in parsed.lead)
    content = digest([lead, parsed.title, parsed.level, parsed.text])
    return Section(chapter, parsed.title, parsed.level, lead, order, parsed.text, source, content)


def _unreadable_ledger(item: Unreadable) -> FileLedger:
    reason = {"unreadable file": item.size} if item.size else {}
    return FileLedger(item.path, item.size, left_out=Counter(reason), problem=item.reason)


def as_rows(report: SectionsReport) -> dict[str, Any]:
    """The report as plain JSON."""
    return {
        "chapters": report.chapters,
        "sections": report.sections,
        "words": report.words,
        "removed": dict(sorted(report.removed.items())),
        "unreadable": [asdict(item) for item in report.unreadable],
        "files": [ledger.row() for ledger in sorted(report.files, key=lambda ledger: natural_key(ledger.path))],
    }
