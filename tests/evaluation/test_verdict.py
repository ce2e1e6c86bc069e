"""The gate: released only on evidence."""

import math

import pytest

from ft_dagster.evaluation.verdict import Rule, Verdict, judge


def measured(**bits_per_byte: float) -> dict[str, dict[str, float]]:
    return {name: {"bits_per_byte": value} for name, value in bits_per_byte.items()}


def test_an_adapter_that_beats_base_and_released_is_released() -> None:
    assert judge(measured(base=1.5, released=1.25, new=1.0), 0.125) == Verdict(
        "release",
        "1.0000 bits per byte on held-out chapters beats the base's 1.5000 and the released's 1.2500",
        (Rule("base", 0.5, 0.125, True), Rule("released", 0.25, 0.125, True)),
    )


def test_the_first_adapter_must_beat_the_base_only() -> None:
    verdict = judge(measured(base=1.5, new=1.0), 0.0)
    assert (verdict.decision, [rule.against for rule in verdict.rules]) == ("release", ["base"])


def test_an_adapter_that_loses_to_the_released_one_is_kept_back_and_the_reason_says_so() -> None:
    assert judge(measured(base=1.5, released=1.0, new=1.25), 0.0) == Verdict(
        "keep",
        "1.2500 bits per byte is not better than the released's 1.0000 by more than 0",
        (Rule("base", 0.25, 0.0, True), Rule("released", -0.25, 0.0, False)),
    )


def test_every_rule_that_failed_is_in_the_reason() -> None:
    assert judge(measured(base=1.0, released=1.0, new=1.25), 0.5).reason == (
        "1.2500 bits per byte is not better than the base's 1.0000 by more than 0.5; "
        "1.2500 bits per byte is not better than the released's 1.0000 by more than 0.5"
    )


@pytest.mark.parametrize(("base", "new", "minimum"), [(1.0, 1.0, 0.0), (1.5, 1.0, 0.5), (0.0, 0.0, 0.0)])
def test_a_gain_equal_to_the_minimum_is_not_enough(base: float, new: float, minimum: float) -> None:
    assert judge(measured(base=base, new=new), minimum).decision == "keep"


@pytest.mark.parametrize("new", [math.nan, math.inf])
def test_an_adapter_that_measures_no_number_is_kept_back(new: float) -> None:
    assert judge(measured(base=1.0, released=math.inf, new=new), 0.0).decision == "keep"


def test_a_verdict_is_plain_data() -> None:
    assert judge(measured(base=1.5, new=1.0), 0.0).to_json() == {
        "decision": "release",
        "reason": "1.0000 bits per byte on held-out chapters beats the base's 1.5000",
        "rules": ({"against": "base", "measured": 0.5, "threshold": 0.0, "passed": True},),
    }
