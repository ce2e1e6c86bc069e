"""The choice of what is held out: a share of the text, in whole chapters where possible, that never changes sides.

In this order of precedence: what the adapter in use was trained on stays on the train side; then each chapter and
section stays on its side, by its name, or by its text if its name is new; then near copies go to one side; then new
text is held out so that the held-out share of the text comes near to the recipe's.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ft_dagster.config.recipe import Objectives, Tokens
from ft_dagster.corpus.files import CorpusError
from ft_dagster.dataset.held_out.near_copies import NEAR_COPY, contained, join_near_copies
from ft_dagster.dataset.held_out.outline import Outline, OutlineGroup, OutlineRow
from ft_dagster.dataset.held_out.record import Pinned, Split, position, section_unit
from ft_dagster.dataset.held_out.share import Group, distance, pick
from ft_dagster.dataset.held_out.shingles import among

NEEDED = (
    "A pair is an `original` beside the `improved` text of a section, or `final_result.original_text` beside "
    "`final_text`, in a JSON file under outputs/consolidated/"
)
"""What reports must contain for objectives.rewrite; a part of error messages."""
TEXT = Objectives()
FINGERPRINT = 32
"""Number of hexadecimal digits of a section's hash by which the section is recognized in the last dataset."""
_KNOWN = 0.5
"""A new chapter goes to the side of its text if this share of its text has one."""


@dataclass(frozen=True)
class Before:
    """What text was used for until now. It is looked up only if there is new text."""

    find_learned: Callable[[], Collection[str]] = frozenset
    """Returns the hashes of the sections that the adapter in use was trained on."""
    find_sides: Callable[[], Mapping[str, Collection[str]]] = dict
    """Returns split -> fingerprints of the sections and pairs on that side of the last dataset."""
    groups: Collection[str] = ()
    """Keys of the outlines of the last dataset. Chapters in these groups have no new text."""
    read_group: Callable[[str], OutlineGroup] | None = None
    """Returns one of these outlines by its key."""

    @cached_property
    def learned(self) -> Collection[str]:
        return self.find_learned()

    def is_for_training(self, section: str) -> bool:
        """Whether a section, or a pair, was trained on: by the last dataset, or by the adapter in use."""
        side = self.side(section)
        return side is False or (side is None and section in self.learned)

    def side(self, section: str) -> bool | None:
        """Return whether a section, or a pair, was held out in the last dataset; None if it was not in it."""
        fingerprint = section[:FINGERPRINT]
        for split, held in (("held_out", True), ("train", False)):
            if fingerprint in self._sides.get(split, ()):
                return held
        return None

    @cached_property
    def _sides(self) -> Mapping[str, Collection[str]]:
        return self.find_sides()


def choose_split(
    outline: Outline, options: Tokens, pinned: Pinned, objectives: Objectives = TEXT, before: Before | None = None
) -> Split:
    """Choose which chapters and sections are held out. If only rewriting is taught, only sections in pairs count.

    Chapters are chosen as a whole, unless they are so few or so unequal that the held-out share of the text would not
    be between half and twice `options.held_out`: then their sections are chosen, spread over the chapters. If
    `options.held_out` has changed, or one side would be empty, everything is chosen anew.

    Args:
        outline: the outline of the sections.
        options: the recipe's options for tokens.
        pinned: the recorded sides.
        objectives: the recipe's objectives.
        before: what text was used for until now.

    Raises:
        CorpusError: there is only one section, or there are fewer than two pairs if only pairs are taught.
    """
    in_pairs, pairs = not objectives.text, outline.sections.about["pairs"]
    if in_pairs and pairs < 2:
        raise CorpusError(
            f"Only objectives.rewrite is taught, and the reports contain {pairs} pair(s); at least two are needed, one "
            f"to train on and one to measure the adapter on. {NEEDED}."
        )
    if pinned.share in (None, options.held_out):
        text = _read(outline, in_pairs, pinned, before or Before())
        split = text.resolve(_choose(text, outline, options.held_out))
        if 0 < text.held_bytes(split) < text.sizes.total():
            return split
    text = _read(outline, in_pairs, Pinned(share=options.held_out), Before())
    if sum(len(titles) for titles in text.titles.values()) < 2:
        raise CorpusError(
            "The reports are one chapter with one section, so nothing can be held out to measure the adapter on. "
            "Add a chapter, or headings (`## ...`) to this one."
        )
    chosen = _choose(text, outline, options.held_out, preferred=pinned.held_out)
    elsewhere = pinned.without(text.sizes)
    return text.resolve(Pinned(chosen.held_out | elsewhere.held_out, chosen.train | elsewhere.train, options.held_out))


@dataclass
class _Text:
    """The chapters, and those sections of them that have no side yet."""

    pinned: Pinned
    before: Before
    in_pairs: bool
    """Whether only sections in pairs count, because only pairs are taught."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Chapter -> its bytes."""
    titles: dict[str, Counter[str]] = field(default_factory=dict)
    """Chapter -> title -> bytes, for chapters that are new or in which a section has a side of its own."""
    learned: set[str] = field(default_factory=set)
    """Sections of held-out chapters that the adapter in use was trained on."""
    new: list[OutlineRow] = field(default_factory=list)
    """The sections that have no side yet."""
    shingles: list[np.ndarray] = field(default_factory=list)
    """Their shingles."""

    def identity(self, row: OutlineRow) -> str:
        """Return the hash of what is taught of a section: its own, or that of its pair."""
        return row.pair if self.in_pairs else row.section

    def resolve(self, pinned: Pinned) -> Split:
        """Return the split of the chapters that there are, given the sides of all of them."""
        held_out = {chapter for chapter in self.sizes if pinned.side(chapter) and chapter not in self.titles}
        for chapter, titles in self.titles.items():
            sides = {title: _side(pinned, chapter, title) for title in titles}
            if pinned.side(chapter) and all(sides.values()):
                held_out.add(chapter)
            else:
                held_out |= {section_unit(chapter, title) for title, held in sides.items() if held}
        return Split(frozenset(held_out), pinned)

    def held_bytes(self, split: Split) -> int:
        """Return how many bytes a split holds out."""
        whole = sum(size for chapter, size in self.sizes.items() if chapter in split.held_out)
        return whole + sum(
            size
            for chapter, titles in self.titles.items()
            if chapter not in split.held_out
            for title, size in titles.items()
            if section_unit(chapter, title) in split.held_out
        )


def _side(pinned: Pinned, chapter: str, title: str) -> bool | None:
    own = pinned.side(section_unit(chapter, title))
    return pinned.side(chapter) if own is None else own


def _read(outline: Outline, in_pairs: bool, pinned: Pinned, before: Before) -> _Text:
    text = _Text(pinned, before, in_pairs)
    for group in outline.groups():
        for chapter in group.chapters:
            if size := chapter.size_in_pairs if in_pairs else chapter.size:
                text.sizes[chapter.name] = size
        names = [chapter.name for chapter in group.chapters if chapter.name in text.sizes]
        divided = {name for name in names if pinned.side(name) is None or name in pinned.chapters_by_section}
        if not divided and group.key in before.groups:
            continue
        end = 0
        for row in group.rows:
            start, end = end, end + row.shingles
            if in_pairs and not row.pair:
                continue
            side = _side(pinned, row.chapter, row.title) if row.chapter in divided else pinned.side(row.chapter)
            if side is None:
                text.new.append(row)
                text.shingles.append(group.shingles[start:end])
            elif side and before.is_for_training(text.identity(row)):
                text.learned.add(section_unit(row.chapter, row.title))
                divided.add(row.chapter)
        for row in group.rows if divided else ():
            if row.chapter in divided and not (in_pairs and not row.pair):
                text.titles.setdefault(row.chapter, Counter())[row.title] += row.size
    return text


def _choose(text: _Text, outline: Outline, share: float, preferred: Collection[str] = ()) -> Pinned:
    """Return the sides of all text: the recorded ones, and those of new text."""
    sides: dict[str, bool] = dict.fromkeys(text.learned, False)
    if not text.new:
        return _with(text.pinned, sides, share)
    settled, free = _settle(text, _known_sides(text, outline))
    sides |= settled
    first: Pinned | None = None
    while True:
        held = text.held_bytes(text.resolve(_with(text.pinned, sides, share)))
        chosen = _with(text.pinned, sides | _choose_free(text, free, held, share, preferred), share)
        if not (found := _contained_in_train(text, outline, chosen)):
            return chosen
        remaining = _without(text, free, found)
        first = first or chosen
        if not remaining and not held:  # everything is known: then the check says so
            return first
        sides, free = sides | found, remaining


def _without(text: _Text, free: "_Units", found: Collection[str]) -> "_Units":
    """Return the free units without sections that have got a side."""
    kept = {
        unit: [i for i in indices if section_unit(text.new[i].chapter, text.new[i].title) not in found]
        for unit, indices in free.items()
    }
    return {unit: indices for unit, indices in kept.items() if indices}


def _with(pinned: Pinned, sides: Mapping[str, bool], share: float | None) -> Pinned:
    held_out = {unit for unit, held in sides.items() if held}
    return Pinned((pinned.held_out - sides.keys()) | held_out, (pinned.train | sides.keys()) - held_out, share)


def _shared_with(text: _Text, outline: Outline, pinned: Pinned, gone: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return which shingles of new sections are also in text that is trained on, and in text that is held out.

    Both are sorted. Sections without a side among `pinned` count for neither. With `gone`, text of the last dataset
    that is no longer there counts, too: a chapter may have been edited and renamed at once.
    """
    wanted = np.unique(np.concatenate(text.shingles))
    found: dict[bool | None, list[np.ndarray]] = defaultdict(lambda: [np.empty(0, dtype=np.uint64)])

    def collect(group: OutlineGroup, side_of: Callable[[OutlineRow], bool | None]) -> None:
        inside = among(group.shingles, wanted)
        end = 0
        for row in group.rows if inside.any() else ():
            start, end = end, end + row.shingles
            found[side_of(row)].append(group.shingles[start:end][inside[start:end]])

    there = set()
    for group in outline.groups() if len(wanted) else ():
        there.add(group.key)
        collect(group, lambda row: _side(pinned, row.chapter, row.title))
    before = text.before
    if gone and before.read_group and len(wanted):
        for key in sorted(set(before.groups) - there):
            collect(before.read_group(key), lambda row: before.side(text.identity(row)))
    return np.unique(np.concatenate(found[False])), np.unique(np.concatenate(found[True]))


def _known_sides(text: _Text, outline: Outline) -> list[bool | None]:
    """Return the side of each new section whose text, or a near copy of it, has one."""
    before = text.before
    names = [text.identity(row) for row in text.new]
    sides = [False if name in before.learned else before.side(name) for name in names]
    in_train, in_held_out = _shared_with(text, outline, text.pinned, gone=True)
    for index, shingles in enumerate(text.shingles):
        trained, held = contained(shingles, in_train), contained(shingles, in_held_out)
        if sides[index] is None and max(trained, held) >= NEAR_COPY:
            sides[index] = held > trained
    return sides


_Units = dict[str, list[int]]
"""Chapters or sections -> the indices of their new sections."""


def _settle(text: _Text, known: Sequence[bool | None]) -> tuple[dict[str, bool], _Units]:
    """Return the units whose text has a side, and those that are free to be chosen.

    A new chapter goes as a whole to the side that most of its text has, if enough of it has one. Its other sections,
    which have the other side, are units of their own.
    """
    settled: dict[str, bool] = {}
    free: _Units = {}
    by_chapter: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, row in enumerate(text.new):
        by_chapter[row.chapter][row.title].append(index)
    for chapter, titles in by_chapter.items():
        units = {section_unit(chapter, title): indices for title, indices in titles.items()}
        sides = {unit: _common(known[index] for index in indices) for unit, indices in units.items()}
        size = {unit: sum(text.new[index].size for index in indices) for unit, indices in units.items()}
        settled |= {unit: side for unit, side in sides.items() if side is not None}
        if sum(size.values()) < text.titles[chapter].total():  # some of its sections were chosen before
            free |= {unit: indices for unit, indices in units.items() if sides[unit] is None}
            continue
        held, trained = (sum(size[unit] for unit in units if sides[unit] is side) for side in (True, False))
        if held + trained >= _KNOWN * sum(size.values()):
            settled[chapter] = held > trained
        else:
            free[chapter] = [index for unit, indices in units.items() if sides[unit] is None for index in indices]
    return settled, free


def _common(sides: Iterable[bool | None]) -> bool | None:
    """Return the side of several texts under one title. Text that is trained on decides."""
    found = set(sides)
    return False if False in found else None if None in found else True


def _choose_free(text: _Text, free: _Units, held: int, share: float, preferred: Collection[str]) -> dict[str, bool]:
    """Choose the side of each free unit, in whole chapters or, where these do not give the share, in sections."""
    wanted = share * text.sizes.total()
    chapters = pick(text.sizes, _groups(text, free, preferred), held, share)
    in_chapters = held + sum(group.size for group in chapters)
    count = sum(bool(text.pinned.side(chapter)) for chapter in text.sizes)
    count += sum(unit in text.sizes for group in chapters for unit in group.units)
    most = count > max(0.5, 2 * share) * len(text.sizes)
    if most or not wanted / 2 <= in_chapters <= 2 * wanted:
        by_section = _in_sections(text, free)
        sections = pick(text.sizes, _groups(text, by_section, preferred), held, share, in_sections=True)
        if not held and not chapters and not sections:  # all text is near copies of one another
            sections = sorted(_groups(text, by_section, preferred, alone=True), key=lambda group: group.size)[:1]
        in_sections = held + sum(group.size for group in sections)
        if most or distance(in_sections, wanted) < distance(in_chapters, wanted):
            picked = {unit for group in sections for unit in group.units}
            return {
                section_unit(text.new[index].chapter, text.new[index].title): unit in picked
                for unit, indices in by_section.items()
                for index in indices
            }
    picked = {unit for group in chapters for unit in group.units}
    return {unit: unit in picked for unit in free}


def _in_sections(text: _Text, free: _Units) -> _Units:
    """Return units divided into sections, except that the sections of one pair stay together."""
    found: _Units = defaultdict(list)
    first_of_pair: dict[tuple[str, str], str] = {}
    for index in (index for indices in free.values() for index in indices):
        row = text.new[index]
        unit = section_unit(row.chapter, row.title)
        if row.pair:
            unit = first_of_pair.setdefault((row.chapter, row.pair), unit)
        found[unit].append(index)
    return found


def _groups(text: _Text, units: _Units, preferred: Collection[str], alone: bool = False) -> list[Group]:
    """Return units in groups of near copies, or each one alone, in the order in which they are held out.

    What was held out before comes first. Then the order is that of the hashes of their names, but each chapter gives
    one section before any gives a second one.
    """
    size = {unit: sum(text.new[index].size for index in indices) for unit, indices in units.items()}
    names = sorted(units, key=lambda unit: (-size[unit], unit))
    texts = [np.concatenate([text.shingles[index] for index in units[unit]]) for unit in names]
    stands = list(range(len(names))) if alone else join_near_copies(texts)
    turn: Counter[str] = Counter()
    order: dict[str, tuple[bool, int, float]] = {}
    for unit in sorted(units, key=position):
        chapter = text.new[units[unit][0]].chapter
        order[unit] = (unit not in preferred and chapter not in preferred, turn[chapter], position(unit))
        turn[chapter] += 1
    members: dict[int, list[str]] = defaultdict(list)
    for unit, group in zip(names, stands, strict=True):
        members[group].append(unit)
    groups = []
    for together in members.values():
        parts: Counter[str] = Counter()
        for row in (text.new[index] for unit in together for index in units[unit]):
            parts[row.chapter] += row.size
        groups.append(Group(min(order[unit] for unit in together), tuple(together), parts))
    return sorted(groups)


def _contained_in_train(text: _Text, outline: Outline, pinned: Pinned) -> dict[str, bool]:
    """Return new sections that were chosen to be held out although text that is trained on contains most of them."""
    in_train, _ = _shared_with(text, outline, pinned)
    return {
        section_unit(row.chapter, row.title): False
        for row, shingles in zip(text.new, text.shingles, strict=True)
        if _side(pinned, row.chapter, row.title) and contained(shingles, in_train) >= NEAR_COPY
    }
