"""The gate: rules on what was measured decide whether a new adapter is released. The verdict is plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ft_dagster.config.recipe import Release
from ft_dagster.evaluation.bootstrap import Gain, paired_gain
from ft_dagster.evaluation.request import BASE, NEW, RELEASED

Model = Mapping[str, Any]
_BITS = "bits per byte"
_NAMES = {"general": "loss on general text", "chat": "loss on chat", "recited": "passages recited"}
"""The name of the rule for each measurement other than that of held-out chapters."""


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
    sense: Literal["more than", "at most"]
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
    """
    rules = _held_out_rules(models, options, released_before)
    rules += _rules_of_texts(models, options)
    rules += _rules_of_copying(models, options)
    found = tuple(rules)
    missing = {_NAMES[kind]: reason for kind, reason in (not_measured or {}).items()}
    if other_base_in_use:
        reason = "the adapter in use belongs to another base model; set `release: {other_base: true}` to replace it"
        return Verdict("keep", reason, found, missing)
    if withdrawn:
        return replace(WITHDRAWN, rules=found, not_measured=missing)
    failed = [rule for rule in rules if not rule.passed]
    if failed:
        return Verdict("keep", "; ".join(str(rule) for rule in failed), found, missing)
    new, base = (models[name]["bits_per_byte"] for name in (NEW, BASE))
    beaten = [f"the base's {base:.4f}"]
    again = ""
    if RELEASED in models:
        if (released := models[RELEASED]["bits_per_byte"]) - new > options.minimum_gain:
            beaten.append(f"the released's {released:.4f}")
        else:
            again = "; it was in use before, and the reports are again what it was made from"
    reason = f"{new:.4f} bits per byte on held-out chapters beats {' and '.join(beaten)}{again}"
    return Verdict("release", reason, found, missing)


def _held_out_rules(models: Mapping[str, Model], options: Release, released_before: bool) -> list[Rule]:
    gain = _gain(models[BASE], models[NEW], options)
    rules = [_more("gain over the base", "minimum_gain", gain, "low", options.minimum_gain)]
    if RELEASED in models:
        gain = _gain(models[RELEASED], models[NEW], options)
        rules += [
            _more("gain over the released", "minimum_gain", gain, "measured", options.minimum_gain, released_before),
            _more("gain over the released", "worst_loss", gain, "low", -options.worst_loss, released_before),
        ]
    return rules


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
