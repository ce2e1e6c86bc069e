"""Texts that stand in other texts are found, in any script, wherever they begin and however they are set."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_dagster.dataset.held_out.near_copies import contained, join_near_copies
from ft_dagster.dataset.held_out.shingles import LETTERS, SAMPLED, among, shingles

ENGLISH = "abcdefghijklmnopqrstuvwxyz"
THAI = "กขคฆงจฉชซญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ"


def text(seed: int, letters: int, alphabet: str = ENGLISH, space: str = " ") -> str:
    choose = random.Random(seed)
    words = ("".join(choose.choices(alphabet, k=5)) for _ in range(letters // 5))
    return space.join(words)


@pytest.mark.parametrize(("alphabet", "space"), [(ENGLISH, " "), (THAI, ""), ("𠀀𠀁𠀂𠀃𠀄一二三四五六七", "")])
def test_a_passage_has_its_shingles_in_every_text_that_contains_it(alphabet: str, space: str) -> None:
    passage = text(1, 4000, alphabet, space)
    around = f"{text(2, 300, alphabet, space)}\n\n> {passage.upper()}.\n{text(3, 900, alphabet, space)}"
    set_otherwise = "*" + passage.replace(passage[2000:2010], f"\n  {passage[2000:2010]} —") + "*"
    for other in (around, set_otherwise):
        assert contained(shingles(passage), shingles(other)) == 1.0
    assert contained(shingles(passage), shingles(text(4, 4000, alphabet, space))) == 0.0


def test_about_one_run_in_sampled_is_kept_and_a_text_shorter_than_a_run_has_none() -> None:
    assert len(shingles(text(1, 200_000))) == pytest.approx(200_000 / SAMPLED, rel=0.1)
    assert len(shingles("a" * (LETTERS - 1))) == len(shingles("")) == len(shingles("--- | ---")) == 0
    assert len(shingles("a" * 10_000)) <= 1, "each run once"


@given(st.text(max_size=400))
def test_every_text_has_shingles_in_order(found: str) -> None:
    kept = shingles(found)
    assert kept.dtype == np.uint64 and (np.diff(kept.astype(object)) > 0).all()


def test_a_changed_sentence_leaves_most_of_a_text_known() -> None:
    passage = text(1, 6000)
    edited = passage.replace(passage[3000:3060], "another sentence")
    assert 0.8 < contained(shingles(edited), shingles(passage)) < 1.0


def test_near_copies_join_the_largest_and_a_chain_of_revisions_is_one() -> None:
    parts = [text(seed, 1500) for seed in range(12)]
    revisions = [" ".join(parts[first : first + 6]) for first in range(5)]  # the last has a third of the first
    texts = [*revisions, text(20, 9000), " ".join([parts[2], text(21, 300)])]
    assert join_near_copies([shingles(one) for one in texts]) == [0, 0, 0, 0, 0, 5, 0]
    assert join_near_copies([]) == [] and join_near_copies([shingles("")] * 2) == [0, 1]


def test_values_are_found_among_none_and_among_some() -> None:
    values = np.array([1, 5, 9], dtype=np.uint64)
    assert among(values, np.empty(0, dtype=np.uint64)).tolist() == [False] * 3
    assert among(values, np.array([5, 7], dtype=np.uint64)).tolist() == [False, True, False]
