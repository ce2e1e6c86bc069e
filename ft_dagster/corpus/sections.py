"""The sections of all chapters: each text once, stored in groups of chapters, and recomputed only where files changed.

Each group of chapters is stored as two blobs: its chapters as JSON Lines, and the stats from which the totals over all
groups are computed. The artifact names the blobs of each group, and the sections in it whose text another chapter
already contains.
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
from ft_dagster.corpus.secrets import SecretFinding, chapter_findings
from ft_dagster.corpus.shards import Each, overlap
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.corpus.snapshot import SnapshotShard, shard_files, snapshot_shards, unreadable_files
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact, Store

CODE_VERSION = "4"
"""Increased by hand when the same files would result in other sections, or in other findings."""
KIND = "sections"
"""The name of this kind of artifact in the store."""
DUPLICATE = "exact duplicate"
_SHARDS = "shards.json"
_UNREADABLE = "unreadable.json"
_FINDINGS = "findings.json"
_CHECKS_ONLY = {"unreadable", "secrets"}
"""Fields of the recipe that affect only a check, not the sections."""
_FINGERPRINT_BYTES = 16
"""Number of bytes of a text's SHA-256 by which the text is recognized."""


@dataclass(frozen=True)
class SectionShard:
    """The stored sections of a group of chapters."""

    group: str
    snapshot: str
    """Blob of the snapshot's group that the sections were made from."""
    lines: str
    """Blob with one chapter per line."""
    figures: str
    """Blob with the ShardStats as JSON."""
    duplicates: tuple[int, ...]
    """Indices, within the group, of the sections that are left out because another chapter contains their text."""
    versions: tuple[tuple[str, str], ...]
    """Names and versions of the chapters from which such sections are left out."""


@dataclass
class ShardStats:
    """The stats of a group, from which totals over all groups are computed without reading any text."""

    chapters: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, number of sections, and version of each chapter, before duplicates are left out."""
    prints: str = ""
    """The first bytes of the SHA-256 of each section's text, concatenated, in hexadecimal."""
    used: list[int] = field(default_factory=list)
    """Number of bytes of each section."""
    words: list[int] = field(default_factory=list)
    """Number of words of each section."""
    pairs: list[list[int]] = field(default_factory=list)
    """For each pair, the indices within the group of the sections that contain its improved text."""
    bytes_in: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Any] = field(default_factory=list)
    """Texts that look like a key or like personal data: the fields of each SecretFinding."""


def make_sections(snapshot: Artifact, options: Corpus, each: Each = map) -> Artifact:
    """Return the sections of a snapshot, from the store if they are in it; otherwise compute and store them.

    A chapter is read again only if its files have changed since the sections that were stored last, and a group of
    chapters is written again only if one of its chapters has changed.

    Args:
        snapshot: the snapshot of the reports.
        options: the recipe's options for the corpus.
        each: applies a function to each group that is written, in order: `map`, or a function that does so on other
            machines.

    Raises:
        LedgerError: the bytes do not add up.
        StoreError: the bytes of a chapter are missing from the store, or damaged.
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
    store.fetch_blobs(group.figures for group in groups)
    stats = [ShardStats(**json.loads(store.get_blob(group.figures))) for group in groups]
    shards = [
        earlier.with_duplicates(group, duplicates)
        for group, duplicates in zip(groups, _find_duplicates(stats), strict=True)
    ]
    unreadable = [asdict(item) for item in unreadable_files(snapshot)]
    about = {"made_by": made_by, SNAPSHOT: snapshot.key, "version": _version(shards, stats)}
    about |= _totals(shards, stats, unreadable)
    unreadable += [item for shard_stats in stats for item in shard_stats.unreadable]
    findings = [item for shard_stats in stats for item in shard_stats.findings]
    with store.staging() as folder:
        (folder / _SHARDS).write_text(json.dumps([asdict(shard) for shard in shards], indent=1), "utf-8")
        (folder / _UNREADABLE).write_text(json.dumps(unreadable, indent=1, ensure_ascii=False), "utf-8")
        (folder / _FINDINGS).write_text(json.dumps(findings, ensure_ascii=False), "utf-8")
        return store.commit(KIND, key, folder, about)


def stored_shards(sections: Artifact) -> list[SectionShard]:
    """Return the groups that the sections are stored in."""
    return [
        SectionShard(**row | {"duplicates": tuple(row["duplicates"]), "versions": tuple(map(tuple, row["versions"]))})
        for row in sections.read_json(_SHARDS)
    ]


def stored_chapters(store: Store, shard: SectionShard) -> Iterator[Chapter]:
    """Yield the chapters of a group, without the texts that other chapters contain."""
    first = 0
    for line in store.get_blob(shard.lines).decode().split("\n"):
        chapter = _chapter(json.loads(line))
        after = first + len(chapter.sections)
        inside = shard.duplicates[bisect_left(shard.duplicates, first) : bisect_left(shard.duplicates, after)]
        chapter.remove([index - first for index in inside], DUPLICATE)
        first = after
        yield chapter


def all_chapters(sections: Artifact) -> Iterator[Chapter]:
    """Yield all chapters, group by group."""
    shards = stored_shards(sections)
    sections.store.fetch_blobs(shard.lines for shard in shards)
    for shard in shards:
        yield from stored_chapters(sections.store, shard)


def unreadable_rows(sections: Artifact) -> list[dict[str, Any]]:
    """Return the files that could not be read, as plain data: `path`, `reason`, `size`."""
    return list(sections.read_json(_UNREADABLE))


def secret_findings(sections: Artifact) -> list[SecretFinding]:
    """Return the texts that look like a key or like personal data, in the natural order of the chapters."""
    found = [SecretFinding(*row) for row in sections.read_json(_FINDINGS)]
    return sorted(found, key=lambda finding: natural_key(finding.chapter))


class _Earlier:
    """The sections that were stored last, from which unchanged groups and chapters are reused."""

    def __init__(self, store: Store, sections: Artifact | None) -> None:
        self.store = store
        self.shards = stored_shards(sections) if sections else []
        self.by_snapshot = {shard.snapshot: shard for shard in self.shards}

    def same(self, wanted: SnapshotShard) -> SectionShard | None:
        """Return the stored group if its files are the same and its blobs exist; otherwise None."""
        shard = self.by_snapshot.get(wanted.blob)
        if shard is None or not (self.store.has_blob(shard.lines) and self.store.has_blob(shard.figures)):
            return None
        return replace(shard, group=wanted.group)  # the group may have had another name

    def lines(self, group: str) -> dict[str, str]:
        """Return the stored lines of chapters that may belong to a group: key -> line."""
        found: dict[str, str] = {}
        for shard in self.shards:
            if overlap(shard.group, group) and self.store.has_blob(shard.lines):
                for line in self.store.get_blob(shard.lines).decode().split("\n"):
                    found[json.loads(line)["key"]] = line
        return found

    def with_duplicates(self, shard: SectionShard, duplicates: tuple[int, ...]) -> SectionShard:
        """Return the group with these sections left out. Its text is read only if the duplicates are new."""
        if shard.duplicates == duplicates and bool(shard.versions) == bool(duplicates):
            return shard
        marked = replace(shard, duplicates=duplicates, versions=())
        if not duplicates:
            return marked
        chapters = [chapter for chapter in stored_chapters(self.store, marked) if chapter.removed[DUPLICATE]]
        return replace(marked, versions=tuple((c.name, _chapter_version(c)) for c in chapters))


def _write_group(store: Store, options: Corpus, earlier: _Earlier, shard: SnapshotShard) -> SectionShard:
    files: dict[str, list[SourceFile]] = defaultdict(list)
    for file in shard_files(store, shard):
        files[file.chapter].append(file)
    known = earlier.lines(shard.group)
    keys = {name: digest([name, [[f.kind, f.path, f.sha256] for f in members]]) for name, members in files.items()}
    store.fetch_blobs(file.sha256 for name, key in keys.items() if key not in known for file in files[name])
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
    stats = canonical_json(vars(replace(_stats_of(chapters), findings=findings)))
    lines_blob, stats_blob = store.put_blobs(["\n".join(lines).encode(), stats])
    return SectionShard(shard.group, shard.blob, lines_blob, stats_blob, (), ())


def _line(key: str, chapter: Chapter) -> str:
    """Return a chapter as one line of JSON.

    Only LF ends a line: the text may contain other characters that some functions treat as line ends.
    """
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


def _stats_of(chapters: Sequence[Chapter]) -> ShardStats:
    stats = ShardStats()
    prints = []
    for chapter in chapters:
        first = len(stats.used)
        stats.chapters.append((chapter.name, len(chapter.sections), _chapter_version(chapter)))
        stats.pairs += [[first + index for index in pair.sections] for pair in chapter.pairs]
        stats.removed.update(chapter.removed)
        for section in chapter.sections:
            prints.append(hashlib.sha256(section.text.encode()).digest()[:_FINGERPRINT_BYTES])
            stats.used.append(section.used_bytes)
            stats.words.append(len(section.text.split()))
        for ledger in chapter.files:
            stats.bytes_in += ledger.size
            stats.left_out.update(ledger.left_out)
            if ledger.problem:
                stats.unreadable.append({"path": ledger.path, "reason": ledger.problem, "size": ledger.size})
    stats.prints = b"".join(prints).hex()
    return stats


def _chapter_version(chapter: Chapter) -> str:
    """Return the hash of a chapter's sections and pairs in order, or an empty string if it has no sections.

    The hash depends neither on the files that were read nor on what was left out.
    """
    if not chapter.sections:
        return ""
    pairs = [[pair.hash, pair.sections, pair.whole] for pair in chapter.pairs]
    return digest([[section.hash for section in chapter.sections], pairs])


def _version(shards: Sequence[SectionShard], stats: Sequence[ShardStats]) -> str:
    """Return the hash of what a reader sees: the chapters that have text, by name, and their sections in order.

    The names of the groups with text are included, too, because rows are packed group by group: everything that is made
    from sections of one version is always the same.
    """
    versions = {name: version for shard_stats in stats for name, _, version in shard_stats.chapters}
    versions |= {name: version for shard in shards for name, version in shard.versions}
    with_text = [
        shard.group
        for shard, shard_stats in zip(shards, stats, strict=True)
        if any(versions[name] for name, *_ in shard_stats.chapters)
    ]
    return digest([sorted((name, version) for name, version in versions.items() if version), sorted(with_text)])


def _find_duplicates(stats: Sequence[ShardStats]) -> list[tuple[int, ...]]:
    """Return, for each group, the sections whose text occurs earlier in reading order."""
    prints = np.frombuffer(bytes.fromhex("".join(shard_stats.prints for shard_stats in stats)), dtype=np.uint8)
    heads = prints.reshape(-1, _FINGERPRINT_BYTES)[:, :8].copy().view(np.uint64).ravel()  # (sections)
    order = np.argsort(heads, kind="stable")
    same_as_next = np.flatnonzero(heads[order[1:]] == heads[order[:-1]])
    suspects = set(order[same_as_next].tolist()) | set(order[same_as_next + 1].tolist())
    ends = list(accumulate(len(shard_stats.used) for shard_stats in stats))
    places: dict[bytes, list[tuple[Any, int, int]]] = defaultdict(list)
    for index in suspects:
        group = bisect_right(ends, index)
        inside = index - (ends[group - 1] if group else 0)
        starts = list(accumulate((count for _, count, _ in stats[group].chapters), initial=0))
        name = stats[group].chapters[bisect_right(starts, inside) - 1][0]
        text = prints[index * _FINGERPRINT_BYTES : (index + 1) * _FINGERPRINT_BYTES].tobytes()
        places[text].append(((natural_key(name), inside), group, inside))
    duplicates: list[list[int]] = [[] for _ in stats]
    for found in places.values():
        for _, group, inside in sorted(found)[1:]:
            duplicates[group].append(inside)
    return [tuple(sorted(inside)) for inside in duplicates]


def _totals(
    shards: Sequence[SectionShard], stats: Sequence[ShardStats], unreadable: Collection[dict[str, Any]]
) -> dict[str, Any]:
    """Return the counts over all groups."""
    left_out: Counter[str] = Counter({"unreadable file": sum(item["size"] for item in unreadable)})
    removed: Counter[str] = Counter()
    total: Counter[str] = Counter(bytes_in=sum(item["size"] for item in unreadable))
    for shard, shard_stats in zip(shards, stats, strict=True):
        left_out.update(shard_stats.left_out)
        removed.update(shard_stats.removed)
        out = set(shard.duplicates)
        removed[DUPLICATE] += len(out)
        left_out[DUPLICATE] += sum(shard_stats.used[index] for index in out)
        total["bytes_in"] += shard_stats.bytes_in
        total["sections"] += len(shard_stats.used) - len(out)
        total["used"] += sum(shard_stats.used) - sum(shard_stats.used[index] for index in out)
        total["words"] += sum(shard_stats.words) - sum(shard_stats.words[index] for index in out)
        total["pairs"] += sum(out.isdisjoint(pair) for pair in shard_stats.pairs)
        first = 0
        for _, count, _ in shard_stats.chapters:
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
