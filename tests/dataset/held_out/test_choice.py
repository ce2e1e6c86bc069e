"""Which chapters and sections are held out, and that none ever changes sides."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.config.recipe import Tokens
from ft_dagster.corpus.files import CorpusError
from ft_dagster.dataset.held_out.choice import FINGERPRINT, Before, choose_split
from ft_dagster.dataset.held_out.near_copies import known_share
from ft_dagster.dataset.held_out.outline import Outline, OutlineGroup, OutlineRow
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.held_out.shingles import shingles
from ft_dagster.store.hashing import digest

SHARES = st.sampled_from([0.01, 0.1, 0.5, 0.9])
NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)
SIZES = st.sampled_from([1, 40, 100, 101, 5000])


@dataclass(frozen=True)
class Part:
    """A section of a report, as far as the choice looks at it."""

    chapter: str
    title: str
    size: int
    text: str = ""
    was: str = ""
    """Its hash, if it has another title than the one that the hash is of."""

    @property
    def hash(self) -> str:
        return self.was or digest([self.title, self.size, self.text])


class Listed(Outline):
    """The outline of sections that are in memory."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(SimpleNamespace(about={"pairs": 0}), ())  # type: ignore[arg-type]
        object.__setattr__(self, "parts", parts)

    def groups(self) -> Iterator[OutlineGroup]:
        parts: list[Part] = sorted(vars(self)["parts"], key=lambda part: part.chapter)
        found = [shingles(part.text) for part in parts]
        rows = [OutlineRow(p.chapter, p.title, p.hash, p.size, "", len(s)) for p, s in zip(parts, found, strict=True)]
        yield OutlineGroup.of("", rows, np.concatenate([np.empty(0, dtype=np.uint64), *found]))


def chapter(name: str, sections: int = 3, size: int = 100) -> list[Part]:
    return [Part(name, f"section {number}", size + number, f"{name} {number}") for number in range(sections)]


def choose(parts: Sequence[Part], share: float, pinned: Pinned | None = None, before: Before | None = None) -> Split:
    return choose_split(Listed(parts), Tokens(held_out=share), pinned or Pinned(), before=before)


def sides(parts: Sequence[Part], split: Split) -> dict[tuple[str, str], bool]:
    """Return for each (chapter, section) whether it is held out."""
    return {(part.chapter, part.title): split.holds_out(part.chapter, part.title) for part in parts}


def held_share(parts: Sequence[Part], split: Split) -> float:
    held = sum(part.size for part in parts if split.holds_out(part.chapter, part.title))
    return held / sum(part.size for part in parts)


def sized(sizes: dict[str, Sequence[int]]) -> list[Part]:
    """Return chapters with sections of these sizes."""
    return [
        Part(name, f"section {number}", size, f"{name} {number}")
        for name, of in sizes.items()
        for number, size in enumerate(of)
    ]


def prose(seed: int, letters: int = 6000) -> str:
    """Return a text of arbitrary words that no other seed gives."""
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefghij", k=6)) for _ in range(letters // 6))


def before_of(parts: Sequence[Part], split: Split) -> Before:
    """Return what is known of text once an adapter was trained on this split, and released."""
    prints: dict[bool, set[str]] = {True: set(), False: set()}
    for part in parts:
        prints[split.holds_out(part.chapter, part.title)].add(part.hash[:FINGERPRINT])
    learned = {part.hash for part in parts if not split.holds_out(part.chapter, part.title)}
    return Before(lambda: learned, lambda: {"train": prints[False], "held_out": prints[True]})


# What never changes


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES)
def test_added_chapters_move_no_others_and_both_splits_have_text(names: list[str], share: float) -> None:
    pinned, before = Pinned(), {}
    parts: list[Part] = []
    for name in names:  # from a single chapter, whose sections are split, to several
        parts = [*parts, *chapter(name)]
        split = choose(parts, share, pinned)
        now = sides(parts, split)
        assert {unit: now[unit] for unit in before} == before
        assert set(now.values()) == {True, False}
        pinned, before = split.pinned, now


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_chapters_that_are_removed_and_added_again_return_to_their_split(
    names: list[str], share: float, data: st.DataObject
) -> None:
    parts = [part for name in names for part in chapter(name)]
    first = choose(parts, share)
    before = sides(parts, first)
    kept = {min(names, key=lambda name: before[name, "section 0"]), max(names, key=lambda n: before[n, "section 0"])}
    kept |= data.draw(st.sets(st.sampled_from(names)))
    fewer = [part for part in parts if part.chapter in kept]
    if set(sides(fewer, first).values()) != {True, False}:
        return
    second = choose(fewer, share, first.pinned)
    assert sides(fewer, second) == {unit: before[unit] for unit in sides(fewer, second)}
    assert sides(parts, choose(parts, share, second.pinned)) == before


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_both_splits_have_text_whatever_is_removed_and_added(
    names: list[str], share: float, data: st.DataObject
) -> None:
    pinned = Pinned()
    for _ in range(4):
        present = data.draw(st.sets(st.sampled_from(names), min_size=1))
        parts = [part for name in sorted(present) for part in chapter(name, size=data.draw(SIZES))]
        split = choose(parts, share, pinned)
        assert set(sides(parts, split).values()) == {True, False}
        assert choose(parts, share, split.pinned) == split, "the choice is settled at once"
        pinned = split.pinned


@settings(max_examples=100, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_the_order_of_chapters_does_not_matter(names: list[str], share: float, data: st.DataObject) -> None:
    parts = [part for name in names for part in chapter(name)]
    shuffled = data.draw(st.permutations(parts))
    assert choose(shuffled, share) == choose(parts, share)


# The share of the text


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_requested_share_of_many_like_chapters_is_held_out_as_a_whole(share: float) -> None:
    parts = [Part(f"chapter_{number}", "", 100) for number in range(2000)]
    split = choose(parts, share)
    assert split.held_out <= {part.chapter for part in parts}
    assert held_share(parts, split) == pytest.approx(share, rel=0.12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(200, 4000), min_size=2, max_size=12), min_size=1, max_size=19))
def test_between_half_and_twice_the_share_is_held_out_where_a_section_is_small_enough(of: list[list[int]]) -> None:
    parts = sized({f"c{number}": sizes for number, sizes in enumerate(of)})
    total = sum(part.size for part in parts)
    split = choose(parts, 0.1)
    if max(part.size for part in parts) <= 0.1 * total:
        assert 0.05 <= held_share(parts, split) <= 0.2
    held = Counter(part.chapter for part in parts if split.holds_out(part.chapter, part.title))
    for name in held.keys() - split.held_out:
        mine = [part for part in parts if part.chapter == name]
        assert sum(p.size for p in mine if split.holds_out(name, p.title)) <= sum(p.size for p in mine) / 2


def test_a_report_grows_chapter_by_chapter_and_keeps_its_share() -> None:
    sizes = random.Random(1)
    parts: list[Part] = []
    pinned = Pinned()
    for number in range(40):
        parts += chapter(f"c{number}", size=sizes.randint(500, 1500))
        split = choose(parts, 0.1, pinned)
        pinned = split.pinned
        assert number < 4 or 0.05 <= held_share(parts, split) <= 0.2, number


def test_a_list_of_figures_beside_long_chapters_is_not_what_is_measured() -> None:
    parts = sized({"a": [3000] * 5, "b": [2500] * 6, "list of figures": [60], "c": [3100] * 4})
    split = choose(parts, 0.1)
    assert "list of figures" not in split.held_out and 0.05 <= held_share(parts, split) <= 0.2


def test_a_long_chapter_beside_a_small_one_gives_some_of_its_sections() -> None:
    parts = sized({"report": [4000] * 12, "README": [900]})
    split = choose(parts, 0.1)
    assert split.held_out & {f"report#section {number}" for number in range(12)}
    assert 0.05 <= held_share(parts, split) <= 0.2


def test_of_one_huge_chapter_and_small_ones_no_side_has_all_the_small_ones() -> None:
    parts = sized({"huge": [3000] * 20, **{f"c{number}": [500, 500] for number in range(6)}})
    split = choose(parts, 0.1)
    assert 0.05 <= held_share(parts, split) <= 0.2
    held = {part.chapter for part in parts if split.holds_out(part.chapter, part.title)}
    assert "huge" in held and len(held) > 3, "spread over the chapters"
    assert {part.chapter for part in parts if not split.holds_out(part.chapter, part.title)} == {*held, "huge"} | {
        f"c{number}" for number in range(6)
    }


def test_a_new_heading_in_a_divided_chapter_is_chosen_like_a_new_chapter() -> None:
    parts = sized({"only": [1000] * 10})
    split = choose(parts, 0.1)
    (unit,) = split.held_out
    grown = sized({"only": [1000] * 30})
    later = choose(grown, 0.1, split.pinned)
    assert unit in later.held_out and len(later.held_out) == 3


def test_a_report_of_one_section_cannot_be_split() -> None:
    with pytest.raises(CorpusError, match="one chapter with one section, so nothing can be held out"):
        choose([Part("a", "one", 10), Part("a", "one", 12)], 0.1)


def test_another_share_in_the_recipe_chooses_anew_and_keeps_what_it_can() -> None:
    parts = [part for number in range(40) for part in chapter(f"c{number}")]
    first = choose(parts, 0.1)
    more = choose(parts, 0.3, first.pinned)
    assert first.held_out < more.held_out and held_share(parts, more) == pytest.approx(0.3, abs=0.03)
    less = choose(parts, 0.05, more.pinned)
    assert less.held_out < more.held_out and held_share(parts, less) == pytest.approx(0.05, abs=0.03)


# Sides by text


def renamed(parts: Sequence[Part], old: str, new: str) -> list[Part]:
    return [Part(new if part.chapter == old else part.chapter, part.title, part.size, part.text) for part in parts]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("released", [True, False])
def test_a_renamed_chapter_keeps_its_side(held: bool, released: bool) -> None:
    parts = [part for number in range(12) for part in chapter(f"c{number}")]
    split = choose(parts, 0.1)
    before = before_of(parts, split)
    if not released:
        before = Before(find_sides=before.find_sides)
    for number in range(12):
        if (f"c{number}" in split.held_out) is held:
            later = renamed(parts, f"c{number}", "another name")
            added = [*later, *chapter("new")]
            assert choose(added, 0.1, split.pinned, before).holds_out("another name", "section 0") is held


@pytest.mark.parametrize("released", [True, False])
def test_a_section_that_moves_into_a_held_out_chapter_is_still_trained_on(released: bool) -> None:
    parts = [part for number in range(12) for part in chapter(f"c{number}")]
    split = choose(parts, 0.1)
    before = before_of(parts, split)
    if not released:
        before = Before(find_sides=before.find_sides)
    held = next(iter(split.held_out))
    moved = next(part for part in parts if part.chapter not in split.held_out)
    later = [
        *(part for part in parts if part is not moved),
        replace(moved, chapter=held, title="moved", was=moved.hash),
    ]
    now = choose(later, 0.1, split.pinned, before)
    assert not now.holds_out(held, "moved") and now.holds_out(held, "section 0")
    assert choose(later, 0.1, now.pinned, before_of(later, now)) == now


def test_a_renamed_and_edited_chapter_keeps_its_side_by_the_text_that_is_gone() -> None:
    parts = [Part(f"draft/c{number}", "", 6000, prose(number)) for number in range(20)]
    split = choose(parts, 0.1)
    (gone,) = Listed(parts).groups()
    before = replace(before_of(parts, split), groups={"gone"}, read_group={"gone": gone}.__getitem__)
    later = [Part(f"final/c{number}", "", 6000, prose(number) + " and one word") for number in range(20)]
    now = choose(later, 0.1, split.pinned, before)
    assert now.held_out == {unit.replace("draft", "final") for unit in split.held_out}


def test_a_digest_of_other_chapters_is_not_what_is_held_out() -> None:
    texts = [prose(number) for number in range(10)]
    digest_of_four = "\n".join(text[:1500] for text in texts[:4])
    parts = [Part(f"c{number}", "", 6000, text) for number, text in enumerate(texts)]
    for name in ("digest", "digest4", "note", "summary"):  # of which some come first in the order
        with_digest = [*parts, Part(name, "", 6000, digest_of_four)]
        split = choose(with_digest, 0.1)
        assert name not in split.held_out and 0.05 <= held_share(with_digest, split) <= 0.2
        assert known_share(Listed(with_digest), split) < 0.3


def test_revisions_of_one_manuscript_are_on_one_side_chapter_by_chapter() -> None:
    texts = {f"part{number}": prose(number) for number in range(12)}
    parts = [
        Part(f"2024-{month:02}/{name}", "", 6000, f"Revision {month}. {text} {prose(1000 + month, 300)}")
        for month in range(1, 9)
        for name, text in texts.items()
    ]
    split = choose(parts, 0.1)
    names = {unit.partition("/")[2] for unit in split.held_out}
    assert split.held_out == {f"2024-{month:02}/{name}" for month in range(1, 9) for name in names}
    assert 0.05 <= held_share(parts, split) <= 0.2
    assert known_share(Listed(parts), split) < 0.1, "the sentences that all chapters of a revision share"
    next_month = [Part(f"2024-09/{name}", "", 6000, f"Revision 9. {text}") for name, text in texts.items()]
    later = choose([*parts, *next_month], 0.1, split.pinned, before_of(parts, split))
    assert later.held_out == split.held_out | {f"2024-09/{name}" for name in names}


def test_revisions_of_a_manuscript_in_one_chapter_are_divided_section_by_section() -> None:
    texts = {f"part{number}": prose(number) for number in range(12)}
    parts = [Part(f"2024-{month:02}", name, 6000, text) for month in range(1, 9) for name, text in texts.items()]
    split = choose(parts, 0.1)
    names = {unit.partition("#")[2] for unit in split.held_out}
    assert split.held_out == {f"2024-{month:02}#{name}" for month in range(1, 9) for name in names}
    assert known_share(Listed(parts), split) == 0.0 and 0.05 <= held_share(parts, split) <= 0.2


def test_the_known_share_is_that_of_held_out_text_that_stands_in_train() -> None:
    first, second = prose(1, 30_000), prose(2, 30_000)
    parts = [Part("held", "", 60_000, first + second), Part("train", "", 60_000, f"{prose(3)}\n> {first.upper()}")]
    assert known_share(Listed(parts), Split(frozenset({"held"}), Pinned())) == pytest.approx(0.5, abs=0.05)
    assert known_share(Listed(parts), Split(frozenset({"train"}), Pinned())) == pytest.approx(5 / 6, abs=0.05)
    assert known_share(Listed(parts[:1]), Split(frozenset({"held"}), Pinned())) == 0.0


def test_copies_of_one_text_alone_can_still_be_split() -> None:
    parts: list[Any] = [Part(f"copy {number}", "", 6000 + number, prose(1)) for number in range(3)]
    split = choose(parts, 0.1)
    assert len(split.held_out) == 1 and known_share(Listed(parts), split) == 1.0
