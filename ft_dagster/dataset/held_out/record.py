"""Which chapters and sections are held out for evaluation, and the record of it that a workspace keeps."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ft_dagster.corpus.files import CorpusError
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import write_atomically

_HASH = "hash"
"""Field of the file that contains the hash of the other fields."""


@dataclass(frozen=True)
class Pinned:
    """The side of every chapter or section that was ever chosen, so that none changes sides as the reports change.

    A section's own side counts before its chapter's, and a section of a chapter that has only sections here is new
    unless it is one of them.
    """

    held_out: frozenset[str] = frozenset()
    """Chapters and sections that are held out."""
    train: frozenset[str] = frozenset()
    """Chapters and sections that are trained on."""
    share: float | None = None
    """The recipe's `tokens.held_out` that they were chosen for. None in a record that an earlier version wrote, which
    has only those units that it could not tell by a hash."""

    def side(self, unit: str) -> bool | None:
        """Return whether a chapter or section is held out by itself; None if it has no side of its own."""
        return unit in self.held_out or (False if unit in self.train else None)

    def without(self, chapters: Collection[str]) -> "Pinned":
        """Return the same without these chapters and their sections."""

        def elsewhere(units: frozenset[str]) -> frozenset[str]:
            return frozenset(u for u in units if u not in chapters and not any(n in chapters for n in _may_be_in(u)))

        return Pinned(elsewhere(self.held_out), elsewhere(self.train), self.share)

    @cached_property
    def chapters_by_section(self) -> frozenset[str]:
        """Names that may be those of chapters of which sections have a side of their own."""
        return frozenset(name for unit in self.held_out | self.train for name in _may_be_in(unit))


@dataclass(frozen=True)
class Split:
    """The chapters and sections that are held out, and the sides to record."""

    held_out: frozenset[str]
    pinned: Pinned

    def holds_out(self, chapter: str, section: str) -> bool:
        """Whether a section of a chapter is held out."""
        return chapter in self.held_out or section_unit(chapter, section) in self.held_out

    def units_of(self, chapters: Collection[str]) -> frozenset[str]:
        """Return the held-out units that may be one of these chapters, or a section of one."""
        sections = (self._by_chapter[chapter] for chapter in chapters if chapter in self._by_chapter)
        return self.held_out.intersection(chapters).union(*sections)

    @cached_property
    def _by_chapter(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for unit in self.held_out:
            for name in _may_be_in(unit):
                found[name].add(unit)
        return found


def section_unit(chapter: str, section: str) -> str:
    """Return the name of a section as a unit of the split."""
    return f"{chapter}#{section}"


def _may_be_in(unit: str) -> list[str]:
    """Return the names of chapters that a unit may be a section of: names and titles may contain `#` themselves."""
    parts = unit.split("#")
    return ["#".join(parts[:count]) for count in range(1, len(parts))]


def position(unit: str) -> float:
    """Return the place of a unit in the order in which units are held out, in 0..1: the hash of its name."""
    return int.from_bytes(hashlib.sha256(f"held-out:{unit}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def read_pinned(path: Path) -> Pinned:
    """Return the recorded sides of a workspace; there are none if the file does not exist.

    Raises:
        CorpusError: the file is damaged. If a single letter of a name changed, a held-out chapter would be trained on.
    """
    try:
        content = json.loads(path.read_bytes())
        recorded = content.pop(_HASH, None)
        if recorded not in (None, digest(content)):  # None: the file was written by an earlier version, or by hand
            raise ValueError("its hash is not the one recorded")
        return Pinned(frozenset(content["held_out"]), frozenset(content["train"]), content.get("share"))
    except FileNotFoundError:
        return Pinned()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorpusError(
            f"{path} is damaged ({error}). Restore it: it says which chapters were never trained on. If you changed it "
            f'yourself, delete its line "{_HASH}".'
        ) from None


def write_pinned(path: Path, pinned: Pinned) -> None:
    """Record the sides, unless they are recorded already."""
    if pinned != read_pinned(path):
        content = {"share": pinned.share, "held_out": sorted(pinned.held_out), "train": sorted(pinned.train)}
        write_atomically(path, json.dumps(content | {_HASH: digest(content)}, indent=1, ensure_ascii=False))
