"""Which chapters are held out, and that no chapter ever changes its split."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.files import CorpusError
from ft_dagster.dataset.held_out import (
    Pinned,
    Split,
    choose_held_out,
    position,
    read_pinned,
    section_unit,
    write_pinned,
)

SHARES = st.sampled_from([0.01, 0.1, 0.5, 0.9])
NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)
Rows = list[tuple[str, str, int]]


def chapter(name: str, sections: int = 3) -> Rows:
    return [(name, f"section {number}", 100 + number) for number in range(sections)]


def choose(rows: Rows, share: float, pinned: Pinned) -> Split:
    """Return the split of these sections, chosen from the sizes of chapters and, if necessary, of sections."""
    sizes: Counter[str] = Counter()
    for name, _, size in rows:
        sizes[name] += size
    return choose_held_out(sizes, lambda: iter(rows), share, pinned)


def sides(rows: Rows, split: Split) -> dict[tuple[str, str], bool]:
    """Return for each (chapter, section) whether it is held out."""
    return {(name, title): split.holds_out(name, title) for name, title, _ in rows}


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES)
def test_added_chapters_move_no_others_and_both_splits_have_text(names: list[str], share: float) -> None:
    pinned, before = Pinned(), {}
    rows: Rows = []
    for name in names:  # from a single chapter, whose sections are split, to several
        rows = [*rows, *chapter(name)]
        split = choose(rows, share, pinned)
        now = sides(rows, split)
        assert {unit: now[unit] for unit in before} == before
        assert set(now.values()) == {True, False}
        pinned, before = split.pinned, now


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_chapters_that_are_removed_and_added_again_return_to_their_split(
    names: list[str], share: float, data: st.DataObject
) -> None:
    rows = [row for name in names for row in chapter(name)]
    first = choose(rows, share, Pinned())
    before = sides(rows, first)
    kept = {min(names, key=lambda name: before[name, "section 0"]), max(names, key=lambda n: before[n, "section 0"])}
    kept |= data.draw(st.sets(st.sampled_from(names)))
    fewer = [row for row in rows if row[0] in kept]
    second = choose(fewer, share, first.pinned)
    assert sides(fewer, second) == {unit: before[unit] for unit in sides(fewer, second)}
    assert sides(rows, choose(rows, share, second.pinned)) == before


@settings(max_examples=200, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_both_splits_have_text_whatever_is_removed_and_added(
    names: list[str], share: float, data: st.DataObject
) -> None:
    pinned = Pinned()
    for _ in range(4):
        present = data.draw(st.sets(st.sampled_from(names), min_size=1))
        rows = [row for name in sorted(present) for row in chapter(name)]
        split = choose(rows, share, pinned)
        assert set(sides(rows, split).values()) == {True, False}
        pinned = split.pinned


@settings(max_examples=100, deadline=None)
@given(names=NAMES, share=SHARES, data=st.data())
def test_the_order_of_chapters_does_not_matter(names: list[str], share: float, data: st.DataObject) -> None:
    rows = [row for name in names for row in chapter(name)]
    shuffled = data.draw(st.permutations(rows))
    assert choose(shuffled, share, Pinned()) == choose(rows, share, Pinned())


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_about_the_requested_share_of_many_chapters_is_held_out(share: float) -> None:
    rows = [(f"chapter_{number}", "", 100) for number in range(2000)]
    split = choose(rows, share, Pinned())
    assert split.held_out == {f"chapter_{number}" for number in range(2000) if position(f"chapter_{number}") < share}
    assert len(split.held_out) == pytest.approx(2000 * share, rel=0.2)
    assert split.pinned == Pinned()


def test_sections_of_a_single_chapter_are_held_out_and_pinned_with_it() -> None:
    rows = [("a", "one", 10), ("a", "two", 50), ("a", "three", 40)]
    split = choose(rows, 1e-9, Pinned())
    assert split == Split(frozenset({"a#one"}), Pinned(frozenset({"a#one"}), frozenset({"a"})))


def test_where_the_hash_holds_out_nothing_the_chapter_nearest_to_the_share_is_pinned() -> None:
    split = choose([("a", "", 70), ("b", "", 20), ("c", "", 10)], 1e-9, Pinned())
    assert split == Split(frozenset({"c"}), Pinned(frozenset({"c"}), frozenset()))


def test_where_the_hash_holds_out_everything_the_highest_chapter_is_trained_on() -> None:
    last = max("abc", key=position)
    split = choose([(name, "", 10) for name in "abc"], 1 - 1e-9, Pinned())
    assert split == Split(frozenset("abc") - {last}, Pinned(frozenset(), frozenset({last})))


def test_a_report_of_one_section_cannot_be_split() -> None:
    with pytest.raises(CorpusError, match="one chapter with one section, so nothing can be held out"):
        choose([("a", "one", 10), ("a", "one", 12)], 0.1, Pinned())


def test_a_held_out_chapter_holds_out_its_sections_and_a_section_only_itself() -> None:
    split = Split(frozenset({"a", section_unit("b", "two")}), Pinned())
    assert [split.holds_out(*unit) for unit in (("a", "one"), ("b", "two"), ("b", "one"))] == [True, True, False]


def test_sections_are_not_read_if_only_chapters_were_ever_held_out() -> None:
    def refuse() -> Rows:
        raise AssertionError("all sections would be read")

    first = choose_held_out({"a": 70, "b": 20, "c": 10}, refuse, 1e-9, Pinned())
    assert first.held_out == {"c"}
    assert choose_held_out({"a": 70, "b": 20, "c": 10}, refuse, 1e-9, first.pinned) == first


def test_a_group_of_chapters_has_its_own_held_out_units_and_all_that_are_sections() -> None:
    split = Split(frozenset({"a", "b", "c#one"}), Pinned())
    assert split.units_of({"a", "c", "d"}) == {"a", "c#one"}
    assert split.units_of({"d"}) == {"c#one"}


def test_pinned_decisions_are_read_as_they_were_written(tmp_path: Path) -> None:
    pinned = Pinned(frozenset({"a#é", "b"}), frozenset({"a"}))
    write_pinned(tmp_path / "held_out.json", pinned)
    assert read_pinned(tmp_path / "held_out.json") == pinned


def test_decisions_with_a_flipped_bit_are_refused_by_name_or_read_unchanged(tmp_path: Path) -> None:
    path, pinned = tmp_path / "held_out.json", Pinned(frozenset({"a#é", "b"}), frozenset({"a"}))
    write_pinned(path, pinned)
    whole = path.read_bytes()
    refused = 0
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert read_pinned(path) == pinned, bytes(data)
        except CorpusError as error:
            refused += 1
            assert f"{path} is damaged" in str(error) and "never trained on" in str(error)
    assert refused > 4 * len(whole)


def test_decisions_that_an_earlier_version_wrote_have_no_hash_and_are_read(tmp_path: Path) -> None:
    (tmp_path / "held_out.json").write_text('{"held_out": ["b"], "train": []}')
    assert read_pinned(tmp_path / "held_out.json") == Pinned(frozenset({"b"}))


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"held_out": 3, "train": []}'])
def test_a_file_that_does_not_contain_decisions_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "held_out.json").write_text(content)
    with pytest.raises(CorpusError, match=r"held_out\.json is damaged"):
        read_pinned(tmp_path / "held_out.json")


def test_without_decisions_no_file_is_written(tmp_path: Path) -> None:
    write_pinned(tmp_path / "held_out.json", Pinned())
    assert list(tmp_path.iterdir()) == []
    assert read_pinned(tmp_path / "held_out.json") == Pinned()
