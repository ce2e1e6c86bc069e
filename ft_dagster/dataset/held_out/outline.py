"""The outline of sections: what the choice of held-out text needs to know of each, without reading its text again.

The outline of a group of chapters is one blob: its chapters as a line of JSON, its sections as another one, then the
shingles as bytes. The dataset names it, so that only the outlines of groups that have changed are made for the next
one. Among many chapters, only the first line of most blobs is parsed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ft_dagster.corpus.sections import SectionShard, stored_chapters, stored_shards
from ft_dagster.corpus.shards import Each
from ft_dagster.dataset.held_out.shingles import shingles
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact, Store

_CODE_VERSION = "1"
"""Increased by hand when the same sections would result in another outline."""


class OutlineRow(NamedTuple):
    """One section."""

    chapter: str
    title: str
    section: str
    """Hash of the section."""
    size: int
    """Its used bytes."""
    pair: str
    """Hash of the whole pair that the section belongs to; empty if there is none."""
    shingles: int
    """Number of its shingles."""


class OutlineChapter(NamedTuple):
    """One chapter that has text: the sums over its sections."""

    name: str
    size: int
    size_in_pairs: int
    shingles: int


@dataclass(frozen=True)
class OutlineGroup:
    """The outline of a group of chapters."""

    key: str
    """As `outline_key` returns it."""
    chapters: tuple[OutlineChapter, ...]
    section_lines: bytes
    shingles: np.ndarray
    """Those of all sections, one section's after another's (uint64)."""

    @classmethod
    def of(cls, key: str, rows: Iterable[OutlineRow], found: np.ndarray) -> "OutlineGroup":
        """Return the outline of these sections, which are in order, with their shingles."""
        rows = list(rows)
        chapters = []
        for name, group in groupby(rows, lambda row: row.chapter):
            members = list(group)
            in_pairs = sum(row.size for row in members if row.pair)
            size, count = sum(row.size for row in members), sum(row.shingles for row in members)
            chapters.append(OutlineChapter(name, size, in_pairs, count))
        return cls(key, tuple(chapters), canonical_json(rows), found)

    @classmethod
    def read(cls, key: str, data: bytes) -> "OutlineGroup":
        """Return the outline in a blob."""
        chapters, lines, numbers = data.split(b"\n", 2)
        named = tuple(OutlineChapter(*row) for row in json.loads(chapters))
        return cls(key, named, lines, np.frombuffer(numbers, dtype="<u8"))

    @cached_property
    def rows(self) -> list[OutlineRow]:
        """The sections, in order."""
        return [OutlineRow(*row) for row in json.loads(self.section_lines)]


@dataclass(frozen=True)
class Outline:
    """The sections of all chapters, in groups."""

    sections: Artifact
    blobs: tuple[tuple[SectionShard, str], ...]
    """Each group of chapters, and the blob with its outline."""

    def groups(self) -> Iterator[OutlineGroup]:
        """Yield the outline of each group."""
        store = self.sections.store
        store.fetch_blobs(blob for _, blob in self.blobs)
        for shard, blob in self.blobs:
            yield OutlineGroup.read(outline_key(shard), store.get_blob(blob))


def make_outline(sections: Artifact, known: Mapping[str, str] | None = None, each: Each = map) -> Outline:
    """Return the outline of these sections.

    Args:
        sections: the sections, as `make_sections` returns them.
        known: outlines of groups that were made before: `outline_key` -> blob.
        each: applies a function to each group that is outlined, in order.
    """
    store = sections.store
    shards = stored_shards(sections)
    blobs = {key: blob for key, blob in (known or {}).items() if store.has_blob(blob)}
    new = [shard for shard in shards if outline_key(shard) not in blobs]
    store.fetch_blobs(shard.lines for shard in new)
    for shard, blob in zip(new, each(partial(_write, store), new), strict=True):
        blobs[outline_key(shard)] = blob
    return Outline(sections, tuple((shard, blobs[outline_key(shard)]) for shard in shards))


def outline_key(shard: SectionShard) -> str:
    """Return the hash of everything that determines the outline of a group."""
    return digest([_CODE_VERSION, shard.lines, shard.duplicates])


def _write(store: Store, shard: SectionShard) -> str:
    """Outline a group of sections, and return the blob."""
    rows: list[OutlineRow] = []
    found = [np.empty(0, dtype=np.uint64)]
    for chapter in stored_chapters(store, shard):
        pairs = {place: pair.hash for pair in chapter.pairs if pair.whole for place in pair.sections}
        for place, section in enumerate(chapter.sections):
            kept = shingles(section.text)
            found.append(kept)
            row = (chapter.name, section.title, section.hash, section.used_bytes, pairs.get(place, ""), len(kept))
            rows.append(OutlineRow(*row))
    group = OutlineGroup.of(outline_key(shard), rows, np.concatenate(found))
    lines = [canonical_json(group.chapters), group.section_lines, group.shingles.astype("<u8").tobytes()]
    return store.put_blobs([b"\n".join(lines)])[0]
