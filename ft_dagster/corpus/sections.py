"""The sections of all chapters: each text once, stored in groups of chapters, and made again only where files changed.

A group of chapters is two blobs: its chapters as JSON Lines, and the figures of them that the whole is made of. The
artifact names the blobs of each group and the sections in it that another chapter holds already.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.chapter import Chapter, Section, natural_key, read_chapter
from ft_dagster.corpus.files import SourceFile
from ft_dagster.corpus.ledger import FileLedger
from ft_dagster.corpus.pairs import Pair
from ft_dagster.corpus.secrets import Finding, chapter_findings
from ft_dagster.corpus.shards import Each, overlap
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.corpus.snapshot import SnapshotShard, shard_files, snapshot_shards, unreadable_files
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact, Store

CODE_VERSION = "4"
"""Raised by hand when the same files would give other sections, or other findings in them."""
KIND = "sections"
"""What the store calls them."""
DUPLICATE = "exact duplicate"
_SHARDS = "shards.json"
_UNREADABLE = "unreadable.json"
_FINDINGS = "findings.json"
_CHECKS_ONLY = {"unreadable", "secrets"}
"""Fields of the recipe that decide about a check, not about sections."""
_PRINT = 16
"""Bytes of a text's SHA-256 that it is recognized by."""


@dataclass(frozen=True)
class Shard:
    """The sections of a group of chapters."""

    group: str
    snapshot: str
    """Blob of the snapshot's group that it was made from."""
    lines: str
    """Blob: a chapter a line."""
    figures: str
    """Blob: Figures."""
    duplicates: tuple[int, ...]
    """Sections, counted through the group, that are left out because another chapter holds their text."""
    versions: tuple[tuple[str, str], ...]
    """Names and versions of the chapters that are without some of their sections for that."""


@dataclass
class Figures:
    """What the whole needs to know of a group without reading its text."""

    chapters: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, number of sections, and version of each, duplicates not yet taken out."""
    prints: str = ""
    """Hexadecimal: the beginnings of the SHA-256 of the sections' texts, one after the other."""
    used: list[int] = field(default_factory=list)
    """Bytes of each section."""
    words: list[int] = field(default_factory=list)
    """Words of each section."""
    pairs: list[list[int]] = field(default_factory=list)
    """Of each pair the sections that hold its improved text, counted through the group."""
    bytes_in: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Any] = field(default_factory=list)
    """What looks like a key or personal data: the fields of each Finding."""


def make_sections(snapshot: Artifact, options: Corpus, each: Each = map) -> Artifact:
    """The sections of a snapshot: from the store if they are there, else made from what is there.

    A chapter is read again only if its files changed since the sections that were stored last; a group of chapters
    is written again only if one of them did.

    Args:
        snapshot: of the reports.
        options: the recipe's part for the corpus.
        each: applies a function to each group that is written, in their order: `map`, or what does so elsewhere.

    Raises:
        LedgerError: bytes do not add up.
        StoreError: a chapter's bytes are missing from the store, or damaged.
    """
    store = snapshot.store
    made_by = digest([CODE_VERSION, options.for_keys(exclude=_CHECKS_ONLY)])
    key = digest([snapshot.key, made_by])
    if found := store.find(KIND, key):
        return found
    earlier = _Earlier(store, store.newest(KIND, made_by=made_by))
    wanted = snapshot_shards(snapshot)
    same = {shard.group: known for shard in wanted if (known := earlier.same(shard))}
    changed = [shard for shard in wanted if shard.group not in same]
    written = each(partial(_write_group, store, options, earlier), changed)
    made = same | {shard.group: group for shard, group in zip(changed, written, strict=True)}
    groups = [made[shard.group] for shard in wanted]
    store.bring_blobs(group.figures for group in groups)
    figures = [Figures(**json.loads(store.get_blob(group.figures))) for group in groups]
    shards = [
        earlier.with_duplicates(group, duplicates)
        for group, duplicates in zip(groups, _find_duplicates(figures), strict=True)
    ]
    unreadable = [asdict(item) for item in unreadable_files(snapshot)]
    about = {"made_by": made_by, SNAPSHOT: snapshot.key, "version": _version(shards, figures)}
    about |= _totals(shards, figures, unreadable)
    unreadable += [item for figure in figures for item in figure.unreadable]
    findings = [item for figure in figures for item in figure.findings]
    with store.staging() as folder:
        (folder / _SHARDS).write_text(json.dumps([asdict(shard) for shard in shards], indent=1), "utf-8")
        (folder / _UNREADABLE).write_text(json.dumps(unreadable, indent=1, ensure_ascii=False), "utf-8")
        (folder / _FINDINGS).write_text(json.dumps(findings, ensure_ascii=False), "utf-8")
        return store.take_in(KIND, key, folder, about)


def stored_shards(sections: Artifact) -> list[Shard]:
    """The groups that sections are stored in."""
    return [
        Shard(**row | {"duplicates": tuple(row["duplicates"]), "versions": tuple(map(tuple, row["versions"]))})
        for row in sections.read_json(_SHARDS)
    ]


def stored_chapters(store: Store, shard: Shard) -> Iterator[Chapter]:
    """The chapters of a group, without the texts that other chapters hold."""
    first = 0
    for line in store.get_blob(shard.lines).decode().split("\n"):
        chapter = _chapter(json.loads(line))
        after = first + len(chapter.sections)
        inside = shard.duplicates[bisect_left(shard.duplicates, first) : bisect_left(shard.duplicates, after)]
        chapter.remove([index - first for index in inside], DUPLICATE)
        first = after
        yield chapter


def all_chapters(sections: Artifact) -> Iterator[Chapter]:
    """All chapters, group by group."""
    shards = stored_shards(sections)
    sections.store.bring_blobs(shard.lines for shard in shards)
    for shard in shards:
        yield from stored_chapters(sections.store, shard)


def chapter_sizes(sections: Artifact, in_pairs: bool = False) -> dict[str, int]:
    """Bytes used of each chapter that has any; with `in_pairs`, only of sections that belong to a whole pair."""
    sizes: dict[str, int] = {}
    shards = stored_shards(sections)
    sections.store.bring_blobs(shard.figures for shard in shards)
    for shard in shards:
        figures = Figures(**json.loads(sections.store.get_blob(shard.figures)))
        out = set(shard.duplicates)
        if in_pairs:
            paired = {index for pair in figures.pairs if out.isdisjoint(pair) for index in pair}
            out |= set(range(len(figures.used))) - paired
        for index in out:
            figures.used[index] = 0
        first = 0
        for name, count, _ in figures.chapters:
            size = sum(figures.used[first : first + count])
            if size:
                sizes[name] = size
            first += count
    return sizes


def unreadable_rows(sections: Artifact) -> list[dict[str, Any]]:
    """What could not be read, as plain data: `path`, `reason`, `size`."""
    return list(sections.read_json(_UNREADABLE))


def secret_findings(sections: Artifact) -> list[Finding]:
    """What looks like a key or like personal data in the chapters, in their natural order."""
    found = [Finding(*row) for row in sections.read_json(_FINDINGS)]
    return sorted(found, key=lambda finding: natural_key(finding.chapter))


class _Earlier:
    """What is there to take over from the sections that were stored last."""

    def __init__(self, store: Store, sections: Artifact | None) -> None:
        self.store = store
        self.shards = stored_shards(sections) if sections else []
        self.by_snapshot = {shard.snapshot: shard for shard in self.shards}

    def same(self, wanted: SnapshotShard) -> Shard | None:
        """The group as it is, if its files are the same and its blobs are there."""
        shard = self.by_snapshot.get(wanted.blob)
        if shard is None or not (self.store.has_blob(shard.lines) and self.store.has_blob(shard.figures)):
            return None
        return replace(shard, group=wanted.group)  # it may have been called otherwise

    def lines(self, group: str) -> dict[str, str]:
        """Chapters that may belong to a group, as they were written: key -> line."""
        found: dict[str, str] = {}
        for shard in self.shards:
            if overlap(shard.group, group) and self.store.has_blob(shard.lines):
                for line in self.store.get_blob(shard.lines).decode().split("\n"):
                    found[json.loads(line)["key"]] = line
        return found

    def with_duplicates(self, shard: Shard, duplicates: tuple[int, ...]) -> Shard:
        """The group with these sections left out. Its text is read only where that is new."""
        if shard.duplicates == duplicates and bool(shard.versions) == bool(duplicates):
            return shard
        marked = replace(shard, duplicates=duplicates, versions=())
        if not duplicates:
            return marked
        chapters = [chapter for chapter in stored_chapters(self.store, marked) if chapter.removed[DUPLICATE]]
        return replace(marked, versions=tuple((c.name, _chapter_version(c)) for c in chapters))


def _write_group(store: Store, options: Corpus, earlier: _Earlier, shard: SnapshotShard) -> Shard:
    files: dict[str, list[SourceFile]] = defaultdict(list)
    for file in shard_files(store, shard):
        files[file.chapter].append(file)
    known = earlier.lines(shard.group)
    keys = {name: digest([name, [[f.kind, f.path, f.sha256] for f in members]]) for name, members in files.items()}
    store.bring_blobs(file.sha256 for name, key in keys.items() if key not in known for file in files[name])
    lines, chapters, findings = [], [], []
    for name, members in sorted(files.items(), key=lambda item: natural_key(item[0])):
        key = keys[name]
        line = known.get(key)
        if line is None:
            line = _line(key, read_chapter(name, members, lambda file: store.get_blob(file.sha256), options))
        lines.append(line)
        content = json.loads(line)
        chapters.append(_chapter(content))
        findings += content["findings"]
    figures = canonical_json(vars(replace(_figures(chapters), findings=findings)))
    lines_blob, figures_blob = store.put_blobs(["\n".join(lines).encode(), figures])
    return Shard(shard.group, shard.blob, lines_blob, figures_blob, (), ())


def _line(key: str, chapter: Chapter) -> str:
    """A chapter as one line of JSON. Only LF ends it: the text may hold other characters that end lines for some."""
    content = {
        "key": key,
        "chapter": chapter.name,
        "sections": [[s.title, s.level, s.lead, s.text, s.source, s.hash] for s in chapter.sections],
        "pairs": [[p.title, p.original, p.brief, p.source, p.sections] for p in chapter.pairs],
        "files": [ledger.row() for ledger in chapter.files],
        "removed": chapter.removed,
        "findings": chapter_findings(chapter),
    }
    return json.dumps(content, ensure_ascii=False)


def _chapter(content: Mapping[str, Any]) -> Chapter:
    name = content["chapter"]
    sections = [
        Section(name, title, level, tuple(lead), text, source, section_hash)
        for title, level, lead, text, source, section_hash in content["sections"]
    ]
    pairs = [
        Pair(title, original, "\n\n".join(sections[at].markdown for at in places), tuple(brief), source, tuple(places))
        for title, original, brief, source, places in content["pairs"]
    ]
    return Chapter(
        name,
        sections,
        pairs,
        [FileLedger.from_row(row) for row in content["files"]],
        Counter(content["removed"]),
    )


def _figures(chapters: Sequence[Chapter]) -> Figures:
    figures = Figures()
    prints = []
    for chapter in chapters:
        first = len(figures.used)
        figures.chapters.append((chapter.name, len(chapter.sections), _chapter_version(chapter)))
        figures.pairs += [[first + index for index in pair.sections] for pair in chapter.pairs]
        figures.removed.update(chapter.removed)
        for section in chapter.sections:
            prints.append(hashlib.sha256(section.text.encode()).digest()[:_PRINT])
            figures.used.append(section.used_bytes)
            figures.words.append(len(section.text.split()))
        for ledger in chapter.files:
            figures.bytes_in += ledger.size
            figures.left_out.update(ledger.left_out)
            if ledger.problem:
                figures.unreadable.append({"path": ledger.path, "reason": ledger.problem, "size": ledger.size})
    figures.prints = b"".join(prints).hex()
    return figures


def _chapter_version(chapter: Chapter) -> str:
    """Hash of sections and pairs in order; of none, nothing. Not where they were read from, nor what was left out."""
    if not chapter.sections:
        return ""
    pairs = [[pair.hash, pair.sections, pair.whole] for pair in chapter.pairs]
    return digest([[section.hash for section in chapter.sections], pairs])


def _version(shards: Sequence[Shard], figures: Sequence[Figures]) -> str:
    """Hash of what a reader sees: the chapters that have text, by name, and their sections in order.

    The groups with text are in it, too, because rows are packed group by group: what is made of sections of one
    version is always the same.
    """
    versions = {name: version for figure in figures for name, _, version in figure.chapters}
    versions |= {name: version for shard in shards for name, version in shard.versions}
    with_text = [
        shard.group
        for shard, figure in zip(shards, figures, strict=True)
        if any(versions[name] for name, *_ in figure.chapters)
    ]
    return digest([sorted((name, version) for name, version in versions.items() if version), sorted(with_text)])


def _find_duplicates(figures: Sequence[Figures]) -> list[tuple[int, ...]]:
    """For each group, the sections whose text stands in reading order before them."""
    prints = np.frombuffer(bytes.fromhex("".join(figure.prints for figure in figures)), dtype=np.uint8)
    heads = prints.reshape(-1, _PRINT)[:, :8].copy().view(np.uint64).ravel()  # (sections)
    order = np.argsort(heads, kind="stable")
    same_as_next = np.flatnonzero(heads[order[1:]] == heads[order[:-1]])
    suspects = set(order[same_as_next].tolist()) | set(order[same_as_next + 1].tolist())
    ends = list(accumulate(len(figure.used) for figure in figures))
    places: dict[bytes, list[tuple[Any, int, int]]] = defaultdict(list)
    for index in suspects:
        group = bisect_right(ends, index)
        inside = index - (ends[group - 1] if group else 0)
        starts = list(accumulate((count for _, count, _ in figures[group].chapters), initial=0))
        name = figures[group].chapters[bisect_right(starts, inside) - 1][0]
        text = prints[index * _PRINT : (index + 1) * _PRINT].tobytes()
        places[text].append(((natural_key(name), inside), group, inside))
    duplicates: list[list[int]] = [[] for _ in figures]
    for found in places.values():
        for _, group, inside in sorted(found)[1:]:
            duplicates[group].append(inside)
    return [tuple(sorted(inside)) for inside in duplicates]


def _totals(
    shards: Sequence[Shard], figures: Sequence[Figures], unreadable: Collection[dict[str, Any]]
) -> dict[str, Any]:
    """Counts over all groups."""
    left_out: Counter[str] = Counter({"unreadable file": sum(item["size"] for item in unreadable)})
    removed: Counter[str] = Counter()
    total: Counter[str] = Counter(bytes_in=sum(item["size"] for item in unreadable))
    for shard, figure in zip(shards, figures, strict=True):
        left_out.update(figure.left_out)
        removed.update(figure.removed)
        out = set(shard.duplicates)
        removed[DUPLICATE] += len(out)
        left_out[DUPLICATE] += sum(figure.used[index] for index in out)
        total["bytes_in"] += figure.bytes_in
        total["sections"] += len(figure.used) - len(out)
        total["used"] += sum(figure.used) - sum(figure.used[index] for index in out)
        total["words"] += sum(figure.words) - sum(figure.words[index] for index in out)
        total["pairs"] += sum(out.isdisjoint(pair) for pair in figure.pairs)
        first = 0
        for _, count, _ in figure.chapters:
            total["chapters"] += count > sum(first <= index < first + count for index in out)
            first += count
    return {
        "chapters": total["chapters"],
        "sections": total["sections"],
        "words": total["words"],
        "pairs": total["pairs"],
        "bytes_in": total["bytes_in"],
        "used": total["used"],
        "left_out": dict((+left_out).most_common()),
        "removed": dict((+removed).most_common()),
    }
