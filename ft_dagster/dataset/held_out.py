"""Which chapters are held out for evaluation: decided by the hash of a chapter's identity, once and for all."""

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
"""Field of the file that holds the hash of the others."""


@dataclass(frozen=True)
class Pinned:
    """Decisions the hash alone could not make, kept so that nothing changes sides as the reports grow."""

    held_out: frozenset[str] = frozenset()
    """Units held out though their hash alone would not say so."""
    train: frozenset[str] = frozenset()
    """Units trained on though their hash alone would hold them out."""


@dataclass(frozen=True)
class Split:
    """Which units are held out, and the pinned decisions to remember."""

    held_out: frozenset[str]
    pinned: Pinned

    def holds_out(self, chapter: str, section: str) -> bool:
        """Whether a section of a chapter is held out."""
        return chapter in self.held_out or section_unit(chapter, section) in self.held_out

    def units_of(self, chapters: Collection[str]) -> frozenset[str]:
        """The held-out units that may be one of these chapters, or a section of one."""
        return self.held_out.intersection(chapters) | self._sections

    @cached_property
    def _sections(self) -> frozenset[str]:
        return frozenset(unit for unit in self.held_out if "#" in unit)


def section_unit(chapter: str, section: str) -> str:
    """Name of one section as a unit; used only where the reports are a single chapter."""
    return f"{chapter}#{section}"


def position(unit: str) -> float:
    """Where a unit's name falls in 0..1: below the held-out share it is held out."""
    return int.from_bytes(hashlib.sha256(f"held-out:{unit}".encode()).digest()[:8]) / 2**64


def choose_held_out(
    sizes: Mapping[str, int], sections: Callable[[], Iterable[tuple[str, str, int]]], share: float, pinned: Pinned
) -> Split:
    """Split units into train and held out.

    A chapter is held out when its position is below `share`; what was decided otherwise before stays so. Should
    that hold out nothing, the chapter whose part of the text is nearest to `share` is held out; should it hold
    out everything, the chapter with the highest position is trained on; either is pinned. When there is one
    chapter only, its sections are the units.

    Args:
        sizes: bytes of every chapter that has text.
        sections: gives (chapter, title, bytes) of every section; asked only where sections are units, or were.
        share: of chapters to hold out, between 0 and 1.
        pinned: earlier decisions.

    Raises:
        CorpusError: a single section cannot be split.
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
    if len(chapters) == 1:  # the chapter and its held-out sections stay where they are when others come
        return Split(frozenset(held_out), Pinned(pinned.held_out | held_out, pinned.train | chapters))
    return Split(frozenset(held_out | (named & pinned.held_out)), pinned)


def read_pinned(path: Path) -> Pinned:
    """Earlier decisions of a workspace; none where the file is not there.

    Raises:
        CorpusError: it is damaged. A name with another letter would be learned from although it was held out.
    """
    try:
        content = json.loads(path.read_bytes())
        recorded = content.pop(_HASH, None)
        if recorded not in (None, digest(content)):  # none: written by an earlier version, or by hand
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
    """Remember decisions; nothing is written while there are none."""
    if pinned.held_out or pinned.train:
        content = {"held_out": sorted(pinned.held_out), "train": sorted(pinned.train)}
        write_atomically(path, json.dumps(content | {_HASH: digest(content)}, indent=1, ensure_ascii=False))
