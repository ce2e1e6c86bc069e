"""Confidence intervals of a gain: the same data give the same interval, and little data give a wide one."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.evaluation.bootstrap import Scored, paired_gain

BIT = math.log(2)


def scored(bits: list[list[float]], size: int = 8) -> dict[str, dict[str, tuple[float, int]]]:
    """Return sections of `size` bytes by chapter, from their bits per byte."""
    return {
        f"chapter {number}": {f"section {place}": (value * BIT * size, size) for place, value in enumerate(chapter)}
        for number, chapter in enumerate(bits)
    }


def test_a_gain_weighs_sections_by_their_bytes() -> None:
    before = {"a": {"x": (3 * BIT, 1), "y": (9 * BIT, 9)}}
    after = {"a": {"x": (1 * BIT, 1), "y": (9 * BIT, 9)}}
    assert paired_gain(before, after, 0.95).measured == pytest.approx(0.2)


def test_equal_measurements_give_a_gain_of_exactly_zero() -> None:
    model = scored([[1.0, 2.0], [3.0]])
    gain = paired_gain(model, model, 0.95)
    assert (gain.measured, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_a_gain_in_every_chapter_is_significant_and_a_gain_in_some_is_not() -> None:
    base = scored([[2.0, 2.0]] * 6)
    agreed = paired_gain(base, scored([[1.8, 1.9], [1.9, 1.8], [1.8, 1.8], [1.9, 1.9], [1.8, 1.9], [1.9, 1.9]]), 0.95)
    disputed = paired_gain(base, scored([[1.0, 1.1], [2.9, 2.8], [1.0, 1.2], [2.9, 2.8], [1.1, 1.0], [1.9, 1.9]]), 0.95)
    assert 0.1 < agreed.low < agreed.measured < agreed.high < 0.2
    assert disputed.low < 0 < disputed.measured < disputed.high


def test_a_single_chapter_does_not_make_a_gain_certain() -> None:
    gain = paired_gain(scored([[2.0, 2.0, 2.0, 2.0]]), scored([[1.0, 2.5, 1.2, 1.9]]), 0.95)
    assert gain.low < gain.measured < gain.high


def test_more_chapters_make_the_interval_narrower_and_more_confidence_wider() -> None:
    draw = random.Random(3)

    def measured(chapters: int) -> tuple[Scored, Scored]:
        return scored([[2.0] * 3] * chapters), scored(
            [[draw.gauss(1.9, 0.1) for _ in range(3)] for _ in range(chapters)]
        )

    few, many = measured(4), measured(60)
    width = {name: (gain := paired_gain(*pair, 0.95)).high - gain.low for name, pair in (("few", few), ("many", many))}
    wider = paired_gain(*many, 0.99)
    assert width["many"] < width["few"] / 2
    assert wider.high - wider.low > width["many"]


def test_intervals_contain_the_true_gain_about_as_often_as_their_confidence() -> None:
    """Chapters differ from one another, and so do the sections within a chapter."""
    draw = random.Random(5)
    held = 0
    for _ in range(100):
        effects = [draw.gauss(0.1, 0.05) for _ in range(12)]
        after = scored([[2.0 - effect + draw.gauss(0, 0.02) for _ in range(4)] for effect in effects])
        gain = paired_gain(scored([[2.0] * 4] * 12), after, 0.9)
        held += gain.low <= 0.1 <= gain.high
    assert held >= 82, "of 100, where 90 are promised"


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4), st.integers(1, 50)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_swapping_the_two_models_negates_the_gain(chapters: list[list[tuple[float, float, int]]]) -> None:
    before, after = (
        {str(n): {str(p): (row[side], row[2]) for p, row in enumerate(rows)} for n, rows in enumerate(chapters)}
        for side in (0, 1)
    )
    there, back = paired_gain(before, after, 0.95), paired_gain(after, before, 0.95)
    assert (there.measured, there.low, there.high) == pytest.approx((-back.measured, -back.high, -back.low), abs=1e-9)
    assert there.low <= there.high


def test_models_that_were_measured_on_other_sections_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not measured on the same sections"):
        paired_gain(scored([[1.0]]), scored([[1.0, 1.0]]), 0.95)


def test_sections_without_predictable_bytes_do_not_affect_the_gain() -> None:
    before = {"a": {"x": (8 * BIT, 8)}, "empty": {"y": (0.0, 0)}}
    after = {"a": {"x": (4 * BIT, 8)}, "empty": {"y": (0.0, 0)}}
    gain = paired_gain(before, after, 0.95)
    assert (gain.measured, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="No text"):
        paired_gain({"empty": before["empty"]}, {"empty": after["empty"]}, 0.95)
