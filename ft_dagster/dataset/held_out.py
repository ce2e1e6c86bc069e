"""Choosing the chapters that are held out for evaluation: permanently, by the hash of a chapter's name."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
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
    """Decisions that the hash alone could not make, stored so that no unit changes sides as the reports grow."""

    held_out: frozenset[str] = frozenset()
    """Units that are held out although their hash alone would not hold them out."""
    train: frozenset[str] = frozenset()
    """Units that are trained on although their hash alone would hold them out."""


@dataclass(frozen=True)
class Split:
    """The units that are held out, and the pinned decisions to store."""

    held_out: frozenset[str]
    pinned: Pinned

    def holds_out(self, chapter: str, section: str) -> bool:
        """Whether a section of a chapter is held out."""
        return chapter in self.held_out or section_unit(chapter, section) in self.held_out

    def units_of(self, chapters: Collection[str]) -> frozenset[str]:
        """Return the held-out units that may be one of these chapters, or a section of one."""
        return self.held_out.intersection(chapters) | self._sections

    @cached_property
    def _sections(self) -> frozenset[str]:
        return frozenset(unit for unit in self.held_out if "#" in unit)


def section_unit(chapter: str, section: str) -> str:
    """Return the name of a section as a unit, which is used only if the reports are a single chapter."""
    return f"{chapter}#{section}"


def position(unit: str) -> float:
    """Return the position of a unit's name in 0..1. A unit whose position is below the held-out share is held out."""
    return int.from_bytes(hashlib.sha256(f"held-out:{unit}".encode()).digest()[:8]) / 2**64


def choose_held_out(
    sizes: Mapping[str, int], sections: Callable[[], Iterable[tuple[str, str, int]]], share: float, pinned: Pinned
) -> Split:
    """Split units into train and held out.

    A chapter is held out if its position is below `share`, unless an earlier decision differs. If that would hold out
    nothing, the chapter whose part of the text is closest to `share` is held out; if it would hold out everything, the
    chapter with the highest position is trained on. Either decision is pinned. If there is only one chapter,
    its sections are the units.

    Args:
        sizes: the bytes of every chapter that has text.
        sections: returns (chapter, title, bytes) of every section; called only if sections are units, or were units.
        share: the fraction of chapters to hold out, between 0 and 1.
        pinned: the earlier decisions.

    Raises:
        CorpusError: there is only one section, which cannot be split.
    """
    chapters = set(sizes)
    by_section: Counter[str] = Counter()
    if len(chapters) == 1 or pinned.held_out - chapters:
        for chapter, title, size in sections():
            by_section[section_unit(chapter, title)] += size
    named = set(by_section)
    unit_sizes = Counter(sizes) if len(chapters) > 1 else by_section
    units = set(unit_sizes)
    if len(units) < 2:
        raise CorpusError(
            "The reports are one chapter with one section, so nothing can be held out to measure the adapter on. "
            "Add a chapter, or headings (`## ...`) to this one."
        )
    below = {unit for unit in units if position(unit) < share} | (units & pinned.held_out)
    held_out = below - pinned.train
    if not held_out and not named & pinned.held_out:
        wanted = share * unit_sizes.total()
        held_out = {min(units, key=lambda unit: (abs(unit_sizes[unit] - wanted), position(unit)))}
        pinned = Pinned(pinned.held_out | held_out, pinned.train - held_out)
    elif held_out == units:
        last = max(units, key=position)
        held_out = held_out - {last}
        pinned = Pinned(pinned.held_out - {last}, pinned.train | {last})
    if len(chapters) == 1:  # keep the chapter and its held-out sections on their sides when others are added
        return Split(frozenset(held_out), Pinned(pinned.held_out | held_out, pinned.train | chapters))
    return Split(frozenset(held_out | (named & pinned.held_out)), pinned)


def read_pinned(path: Path) -> Pinned:
    """Return the earlier decisions of a workspace; there are none if the file does not exist.

    Raises:
        CorpusError: the file is damaged. If a single letter of a name changed, a held-out chapter would be trained on.
    """
    try:
        content = json.loads(path.read_bytes())
        recorded = content.pop(_HASH, None)
        if recorded not in (None, digest(content)):  # None: the file was written by an earlier version, or by hand
            raise ValueError("its hash is not the one recorded")
        return Pinned(frozenset(content["held_out"]), frozenset(content["train"]))
    except FileNotFoundError:
        return Pinned()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorpusError(
            f"{path} is damaged ({error}). Restore it: it says which chapters were never trained on. If you changed it "
            f'yourself, delete its line "{_HASH}".'
        ) from None


def write_pinned(path: Path, pinned: Pinned) -> None:
    """Store the decisions. Nothing is written if there are none."""
    if pinned.held_out or pinned.train:
        content = {"held_out": sorted(pinned.held_out), "train": sorted(pinned.train)}
        write_atomically(path, json.dumps(content | {_HASH: digest(content)}, indent=1, ensure_ascii=False))
