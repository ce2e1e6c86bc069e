"""The record of what is held out, and which sections that means."""

from pathlib import Path

import pytest

from ft_dagster.corpus.files import CorpusError
from ft_dagster.dataset.held_out.record import Pinned, Split, read_pinned, section_unit, write_pinned


def test_a_held_out_chapter_holds_out_its_sections_and_a_section_only_itself() -> None:
    split = Split(frozenset({"a", section_unit("b", "two")}), Pinned())
    assert [split.holds_out(*unit) for unit in (("a", "one"), ("b", "two"), ("b", "one"))] == [True, True, False]


def test_a_group_of_chapters_has_the_held_out_units_that_may_be_its_own() -> None:
    split = Split(frozenset({"a", "b", "c#one", "c#one#two"}), Pinned())
    assert split.units_of({"a", "c", "d"}) == {"a", "c#one", "c#one#two"}
    assert split.units_of({"c#one"}) == {"c#one", "c#one#two"}, "as the name of a chapter, and of one with a section"
    assert split.units_of({"d"}) == set()


def test_pinned_decisions_are_read_as_they_were_written(tmp_path: Path) -> None:
    pinned = Pinned(frozenset({"a#é", "b"}), frozenset({"a"}), 0.1)
    write_pinned(tmp_path / "held_out.json", pinned)
    assert read_pinned(tmp_path / "held_out.json") == pinned


def test_decisions_with_a_flipped_bit_are_refused_by_name_or_read_unchanged(tmp_path: Path) -> None:
    path, pinned = tmp_path / "held_out.json", Pinned(frozenset({"a#é", "b"}), frozenset({"a"}), 0.1)
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


def test_decisions_that_an_earlier_version_wrote_have_neither_hash_nor_share(tmp_path: Path) -> None:
    (tmp_path / "held_out.json").write_text('{"held_out": ["b"], "train": []}')
    assert read_pinned(tmp_path / "held_out.json") == Pinned(frozenset({"b"}), share=None)


def test_a_chapter_and_its_sections_are_forgotten_together() -> None:
    pinned = Pinned(frozenset({"a", "b#one"}), frozenset({"a#two", "c"}), 0.1)
    assert pinned.without({"a"}) == Pinned(frozenset({"b#one"}), frozenset({"c"}), 0.1)
    assert pinned.without({"b", "c"}) == Pinned(frozenset({"a"}), frozenset({"a#two"}), 0.1)


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"held_out": 3, "train": []}'])
def test_a_file_that_does_not_contain_decisions_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "held_out.json").write_text(content)
    with pytest.raises(CorpusError, match=r"held_out\.json is damaged"):
        read_pinned(tmp_path / "held_out.json")


def test_without_decisions_no_file_is_written(tmp_path: Path) -> None:
    write_pinned(tmp_path / "held_out.json", Pinned())
    assert list(tmp_path.iterdir()) == []
    assert read_pinned(tmp_path / "held_out.json") == Pinned()
