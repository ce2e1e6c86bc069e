"""The gate releases an adapter only on evidence."""

import json
import math
from typing import Any

import pytest

from ft_dagster.config.recipe import Release
from ft_dagster.evaluation.gate import judge

CHAPTERS = 8


def scored(bits_per_byte: float, spread: float = 0.0) -> dict[str, Any]:
    """Return the scores of a model on chapters of one section each, alternately better and worse by `spread`."""
    sections = {
        f"chapter {n}": {"all": [(bits_per_byte + (spread if n % 2 else -spread)) * math.log(2) * 1000, 1000]}
        for n in range(CHAPTERS)
    }
    return {"bits_per_byte": bits_per_byte, "sections": sections}


def models(
    spread: float = 0.0, general: float = 1.0, chat: float = 1.0, recited: int = 0, **bits_per_byte: float
) -> dict[str, dict[str, Any]]:
    """Return models by name; `spread`, eval sets and recitation are those of the new one."""
    found = {name: scored(value, spread if name == "new" else 0.0) for name, value in bits_per_byte.items()}
    for name, model in found.items():
        new = name == "new"
        model["general"], model["chat"] = scored(general if new else 1.0), scored(chat if new else 1.0)
        model["train"] = {"passages": 100, "recited": recited if new else 1}
    return found


def failed(measured: dict[str, dict[str, Any]], **options: Any) -> list[str]:
    return [rule.field for rule in judge(measured, Release(**options)).rules if not rule.passed]


def test_an_adapter_that_beats_base_and_released_is_released() -> None:
    verdict = judge(models(base=1.5, released=1.25, new=1.0), Release(minimum_gain=0.125))
    assert (verdict.decision, verdict.reason) == (
        "release",
        "1.0000 bits per byte on held-out chapters beats the base's 1.5000 and the released's 1.2500",
    )
    assert all(rule.passed for rule in verdict.rules)


def test_a_rule_that_could_not_be_applied_is_in_the_verdict_with_the_reason() -> None:
    measured = models(base=1.5, new=1.0)
    for model in measured.values():
        del model["chat"]
    verdict = judge(measured, Release(), not_measured={"chat": "the template fails"})
    assert verdict.decision == "release" and verdict.not_measured == {"loss on chat": "the template fails"}
    assert "loss on chat" not in {rule.name for rule in verdict.rules}


def test_the_first_adapter_must_beat_the_base_only() -> None:
    verdict = judge(models(base=1.5, new=1.0), Release())
    assert verdict.decision == "release"
    assert not [rule for rule in verdict.rules if "released" in rule.name]


def test_an_adapter_worse_than_the_released_one_is_held_back_with_the_reason() -> None:
    verdict = judge(models(base=1.5, released=1.0, new=1.25), Release())
    assert (verdict.decision, verdict.reason) == (
        "keep",
        "gain over the released -0.2500 bits per byte (-0.2500 to -0.2500), more than 0 is asked; "
        "gain over the released -0.2500 bits per byte (-0.2500 to -0.2500), more than -0.02 is asked at its lower end",
    )


def test_a_gain_in_only_some_chapters_is_not_enough() -> None:
    assert failed(models(base=1.0, new=0.95)) == []
    assert failed(models(base=1.0, new=0.95, spread=0.5)) == ["minimum_gain"]


def test_a_small_gain_over_the_released_adapter_is_enough_if_no_large_loss_is_likely() -> None:
    assert failed(models(base=2.0, released=1.0, new=0.999, spread=0.01)) == []
    assert failed(models(base=2.0, released=1.0, new=0.999, spread=0.1)) == ["worst_loss"]
    assert failed(models(base=2.0, released=1.0, new=0.999, spread=0.1), worst_loss=0.2) == []


@pytest.mark.parametrize(("base", "new", "minimum"), [(1.0, 1.0, 0.0), (1.5, 1.0, 0.5), (0.0, 0.0, 0.0)])
def test_a_gain_equal_to_the_minimum_is_not_enough(base: float, new: float, minimum: float) -> None:
    assert judge(models(base=base, new=new), Release(minimum_gain=minimum)).decision == "keep"


@pytest.mark.parametrize("new", [math.nan, math.inf])
def test_an_adapter_whose_measurement_is_not_a_number_is_held_back(new: float) -> None:
    assert judge(models(base=1.0, released=1.0, new=new), Release()).decision == "keep"


def test_an_adapter_that_forgot_general_text_or_how_to_answer_is_held_back() -> None:
    assert failed(models(base=1.5, new=1.0, general=1.09, chat=1.09)) == []
    assert failed(models(base=1.5, new=1.0, general=1.11)) == ["general_loss"]
    assert failed(models(base=1.5, new=1.0, chat=1.11)) == ["chat_loss"]
    assert failed(models(base=1.5, new=1.0, general=1.11, chat=1.11), general_loss=0.2, chat_loss=0.2) == []


def test_an_adapter_that_recites_what_the_base_does_not_is_held_back() -> None:
    assert failed(models(base=1.5, new=1.0, recited=3)) == []
    assert failed(models(base=1.5, new=1.0, recited=4)) == ["recited"]
    assert failed(models(base=1.5, new=1.0, recited=4), recited=1.0) == []


def test_rules_without_a_measurement_are_not_applied() -> None:
    measured = models(base=1.5, new=1.0)
    for model in measured.values():
        del model["general"], model["chat"]
        model["train"]["passages"] = 0
    verdict = judge(measured, Release())
    assert (verdict.decision, [rule.field for rule in verdict.rules]) == (
        "release",
        ["minimum_held_out", "minimum_gain"],
    )


@pytest.mark.parametrize(("chapters", "size"), [(8, 249), (1, 5000)], ids=["too few bytes", "a single section"])
def test_nothing_is_released_on_too_little_held_out_text(chapters: int, size: int) -> None:
    measured = models(base=1.5, new=1.0)
    for model in measured.values():
        kept = list(model["sections"])[:chapters]
        nats = {name: model["sections"][name]["all"][0] for name in kept}
        model["sections"] = {name: {"all": [nats[name] * size / 1000, size]} for name in kept}
    verdict = judge(measured, Release())
    assert verdict.decision == "keep" and "raise tokens.held_out, or add text" in verdict.reason
    assert judge(measured, Release(minimum_held_out=0)).decision == "release"
    assert judge(measured, Release(), released_before=True).decision == "release", "it proved itself before"


def test_text_that_the_released_adapter_learned_is_left_out_of_the_comparison_with_it() -> None:
    measured = models(base=1.5, released=1.25, new=1.2)
    for model in measured.values():
        model["sections"] = {name: {f"hash of {name}": row["all"]} for name, row in model["sections"].items()}
    measured["released"]["sections"]["chapter 0"]["hash of chapter 0"] = [0.0, 1000]  # it knows this text by heart
    assert judge(measured, Release()).decision == "keep"
    verdict = judge(measured, Release(), learned={"hash of chapter 0"})
    assert verdict.decision == "release"
    assert "beats the base's 1.5000 and the released's 1.2500; 1 held-out section(s) that the adapter" in verdict.reason
    verdict = judge(measured, Release(), learned={f"hash of chapter {n}" for n in range(CHAPTERS)})
    assert verdict.decision == "release" and "gain over the released" in verdict.not_measured


def test_an_adapter_released_before_need_not_beat_the_released_one() -> None:
    measured = models(base=2.0, released=1.0, new=1.5)
    verdict = judge(measured, Release(), released_before=True)
    assert verdict.decision == "release"
    assert "it was in use before" in verdict.reason
    assert [rule.excused for rule in verdict.rules if "released" in rule.name] == [True, True]
    assert judge(models(base=1.0, released=1.0, new=1.5), Release(), released_before=True).decision == "keep"


def test_the_adapter_of_another_base_is_not_replaced_without_permission() -> None:
    verdict = judge(models(base=1.5, new=1.0), Release(), other_base_in_use=True)
    assert verdict.decision == "keep"
    assert "release: {other_base: true}" in verdict.reason


def test_an_adapter_that_a_user_rolled_back_is_not_released_again_automatically() -> None:
    verdict = judge(models(base=1.5, released=1.25, new=1.0), Release(), withdrawn=True)
    assert verdict.decision == "keep" and "release promote" in verdict.reason


def test_a_verdict_is_plain_data() -> None:
    verdict = judge(models(base=1.5, new=1.0), Release())
    assert json.loads(json.dumps(verdict.to_json()))["rules"][1] == {
        "name": "gain over the base",
        "field": "minimum_gain",
        "measured": pytest.approx(0.5),
        "low": pytest.approx(0.5),
        "high": pytest.approx(0.5),
        "compared": "low",
        "sense": "more than",
        "threshold": 0.0,
        "unit": "bits per byte",
        "passed": True,
        "excused": False,
    }
