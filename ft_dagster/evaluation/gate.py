"""The gate: rules on what was measured decide whether a new adapter is released. The verdict is plain data."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ft_dagster.config.recipe import Release
from ft_dagster.evaluation.bootstrap import Gain, paired_gain
from ft_dagster.evaluation.request import BASE, NEW, RELEASED

Model = Mapping[str, Any]
_BITS = "bits per byte"
_NAMES = {"general": "loss on general text", "chat": "loss on chat", "recited": "passages recited"}
"""The name of the rule for each measurement other than that of held-out chapters."""
_OVER_RELEASED = "gain over the released"
_TOO_LITTLE = (
    "too little text is held out to judge an adapter by (release.minimum_held_out, and at least two sections); raise "
    "tokens.held_out, or add text"
)


@dataclass(frozen=True)
class Rule:
    """The comparison of a measured value with a threshold of the recipe."""

    name: str
    """What is compared, in words."""
    field: str
    """The field of the recipe that contains the threshold."""
    measured: float
    low: float | None
    """The ends of the confidence interval; None if there is none."""
    high: float | None
    compared: Literal["measured", "low"]
    """Which of these values is compared with the threshold."""
    sense: Literal["more than", "at most", "at least"]
    threshold: float
    unit: str
    passed: bool
    excused: bool = False
    """Whether the rule passes whatever was measured."""

    def __str__(self) -> str:
        """Return the comparison in words.

        For example "gain over the base 0.1200 bits per byte (0.1000 to 0.1400), more than 0 is asked at its lower end".
        """
        between = "" if self.low is None else f" ({self.low:.4f} to {self.high:.4f})"
        where = " at its lower end" if self.compared == "low" else ""
        return f"{self.name} {self.measured:.4f} {self.unit}{between}, {self.sense} {self.threshold:g} is asked{where}"


@dataclass(frozen=True)
class Verdict:
    """The decision to release the new adapter or to keep the one in use, and the reason."""

    decision: Literal["release", "keep"]
    reason: str
    rules: tuple[Rule, ...]
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Name of each rule that the recipe asks for and that could not be applied -> the reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


WITHDRAWN = Verdict(
    "keep", "a person took this adapter out of use; `ft-dagster release promote` puts it back", rules=()
)


def judge(
    models: Mapping[str, Model],
    options: Release,
    released_before: bool = False,
    other_base_in_use: bool = False,
    withdrawn: bool = False,
    not_measured: Mapping[str, str] | None = None,
    learned: Collection[str] = (),
) -> Verdict:
    """Decide whether to release the new adapter, which has to pass every rule.

    On held-out chapters it must be better than the base, with confidence, and better than the released adapter if there
    is one; it must not have forgotten general text or how to answer; and it must not recite what it was trained on.

    Args:
        models: name -> measurements, from `evaluate`; of `base` and `new`, and of `released` if an adapter is in use.
        options: the thresholds.
        released_before: whether the new adapter was in use before, and the reports are again those it was made from (an
            edit was undone). It proved itself then, so it need not be better than the adapter of the undone edit.
        other_base_in_use: whether the adapter in use belongs to another base model, so that it was not measured here,
            and the recipe does not allow replacing it (`release.other_base`).
        withdrawn: whether a person took the new adapter out of use earlier; then only a person puts it back.
        not_measured: `general`, `chat` or `recited` -> why it could not be measured, although the recipe asks for it.
        learned: sections that the released adapter was trained on. They are left out of the comparison with it, because
            no adapter predicts held-out text as well as one that was trained on it.
    """
    missing = {_NAMES[kind]: reason for kind, reason in (not_measured or {}).items()}
    models, left_out = _without_learned(models, learned)
    if left_out and RELEASED not in models:
        missing[_OVER_RELEASED] = "the adapter in use was trained on all of the held-out text"
    rules = [_enough_text(models[NEW], options, released_before)] if options.minimum_held_out else []
    rules += _held_out_rules(models, options, released_before)
    rules += _rules_of_texts(models, options)
    rules += _rules_of_copying(models, options)
    found = tuple(rules)
    if other_base_in_use:
        reason = "the adapter in use belongs to another base model; set `release: {other_base: true}` to replace it"
        return Verdict("keep", reason, found, missing)
    if withdrawn:
        return replace(WITHDRAWN, rules=found, not_measured=missing)
    note = f"; {left_out} held-out section(s) that the adapter in use was trained on do not count" if left_out else ""
    failed = [rule for rule in rules if not rule.passed]
    if failed:
        reasons = [_TOO_LITTLE if rule.field == "minimum_held_out" else str(rule) for rule in failed]
        return Verdict("keep", "; ".join(reasons) + note, found, missing)
    new, base = (models[name]["bits_per_byte"] for name in (NEW, BASE))
    beaten = [f"the base's {base:.4f}"]
    again = ""
    if RELEASED in models:
        gain = next(rule for rule in rules if rule.name == _OVER_RELEASED)
        if gain.measured > gain.threshold:
            beaten.append(f"the released's {models[RELEASED]['bits_per_byte']:.4f}")
        else:
            again = "; it was in use before, and the reports are again what it was made from"
    reason = f"{new:.4f} bits per byte on held-out chapters beats {' and '.join(beaten)}{again}{note}"
    return Verdict("release", reason, found, missing)


def judge_refit(models: Mapping[str, Model], options: Release, not_measured: Mapping[str, str]) -> Verdict:
    """Decide whether to release a refit in the place of the adapter that passed the gate.

    It was trained on the held-out text, so only the rules on other text and on recitation can be applied to it.

    Args:
        models: name -> measurements, from `evaluate`; of `base` and `new`.
        options: the thresholds.
        not_measured: as in `judge`.
    """
    missing = {_NAMES[kind]: reason for kind, reason in not_measured.items()}
    rules = (*_rules_of_texts(models, options), *_rules_of_copying(models, options))
    if failed := [str(rule) for rule in rules if not rule.passed]:
        reason = f"it was not trained again on all text for release, because of the result: {'; '.join(failed)}"
        return Verdict("keep", reason, rules, missing)
    return Verdict("release", "it was then trained again on all text, the held-out text included", rules, missing)


def _without_learned(models: Mapping[str, Model], learned: Collection[str]) -> tuple[dict[str, Model], int]:
    """Leave out the sections that the released adapter was trained on, and return how many these are.

    The released model is left out if nothing remains to compare it on; otherwise only its own sections are reduced, and
    those of the others in the comparison with it, so that base and new adapter are still compared on all text.
    """
    if RELEASED not in models:
        return dict(models), 0
    sections = models[RELEASED]["sections"]
    unseen = {
        chapter: {key: row for key, row in rows.items() if key not in learned} for chapter, rows in sections.items()
    }
    count = sum(map(len, sections.values())) - sum(map(len, unseen.values()))
    if not count:
        return dict(models), 0
    others = {name: model for name, model in models.items() if name != RELEASED}
    if not any(size for rows in unseen.values() for _, size in rows.values()):
        return others, count
    nats, size = (sum(row[at] for rows in unseen.values() for row in rows.values()) for at in (0, 1))
    return others | {
        RELEASED: {**models[RELEASED], "sections": unseen, "bits_per_byte": nats / size / math.log(2)}
    }, count


def _enough_text(new: Model, options: Release, released_before: bool) -> Rule:
    """Require enough held-out text, and two sections of it, without which the intervals have no width."""
    sizes = [size for rows in new["sections"].values() for _, size in rows.values() if size]
    passed = released_before or (sum(sizes) >= options.minimum_held_out and len(sizes) > 1)
    return Rule(
        *("held-out text", "minimum_held_out", float(sum(sizes)), None, None, "measured", "at least"),
        *(float(options.minimum_held_out), "bytes", passed, released_before),
    )


def _held_out_rules(models: Mapping[str, Model], options: Release, released_before: bool) -> list[Rule]:
    gain = _gain(models[BASE], models[NEW], options)
    rules = [_more("gain over the base", "minimum_gain", gain, "low", options.minimum_gain)]
    if RELEASED in models:
        new = {**models[NEW], "sections": _same_sections(models[NEW], models[RELEASED])}
        gain = _gain(models[RELEASED], new, options)
        rules += [
            _more(_OVER_RELEASED, "minimum_gain", gain, "measured", options.minimum_gain, released_before),
            _more(_OVER_RELEASED, "worst_loss", gain, "low", -options.worst_loss, released_before),
        ]
    return rules


def _same_sections(model: Model, as_of: Model) -> dict[str, Any]:
    return {
        chapter: {key: model["sections"][chapter][key] for key in rows} for chapter, rows in as_of["sections"].items()
    }


def _rules_of_texts(models: Mapping[str, Model], options: Release) -> list[Rule]:
    thresholds = {
        "general": options.general_loss,
        "chat": options.chat_loss,
    }
    rules = []
    for kind, threshold in thresholds.items():
        if kind in models[NEW]:
            loss = _gain(models[NEW][kind], models[BASE][kind], options)
            rules.append(_at_most(_NAMES[kind], f"{kind}_loss", loss.measured, loss.low, loss.high, threshold, _BITS))
    return rules


def _rules_of_copying(models: Mapping[str, Model], options: Release) -> list[Rule]:
    new, base = models[NEW]["train"], models[BASE]["train"]
    if not new["passages"]:
        return []
    share = (new["recited"] - base["recited"]) / new["passages"]
    return [_at_most(_NAMES["recited"], "recited", share, None, None, options.recited, "of those trained on")]


def _gain(before: Model, after: Model, options: Release) -> Gain:
    return paired_gain(before["sections"], after["sections"], options.confidence)


def _more(
    name: str, field: str, gain: Gain, compared: Literal["measured", "low"], threshold: float, excused: bool = False
) -> Rule:
    passed = excused or getattr(gain, compared) > threshold
    return Rule(
        name, field, gain.measured, gain.low, gain.high, compared, "more than", threshold, _BITS, passed, excused
    )


def _at_most(
    name: str, field: str, measured: float, low: float | None, high: float | None, threshold: float, unit: str
) -> Rule:
    return Rule(name, field, measured, low, high, "measured", "at most", threshold, unit, measured <= threshold)
