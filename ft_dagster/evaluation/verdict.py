"""Whether a new adapter is released: rules over what was measured. The verdict is data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """One comparison: bits per byte of the new adapter against those of another model."""

    against: str
    """`base`, or `released`."""
    measured: float
    """Bits per byte gained (positive is better)."""
    threshold: float
    """What it must exceed."""
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """Release or keep, and why."""

    decision: Literal["release", "keep"]
    reason: str
    rules: tuple[Rule, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    models: Mapping[str, Mapping[str, Any]],
    minimum_gain: float,
    released_before: bool = False,
    other_base_in_use: bool = False,
) -> Verdict:
    """Release if the new adapter beats the base, and the released adapter where there is one, on held-out text.

    Args:
        models: name -> measurements with `bits_per_byte`; `base` and `new`, and `released` where one is in use.
        minimum_gain: bits per byte it must gain more than.
        released_before: it has been in use already, and the reports are again what it was made from (an edit was
            taken back): it proved itself then, so it need not beat the adapter of the text that was taken back.
        other_base_in_use: the adapter in use belongs to another base model, so that it was not measured here, and
            the recipe does not allow to replace it (`release.other_base`).
    """
    new = models["new"]["bits_per_byte"]
    rules = []
    for against in ("base", "released"):
        if against in models:
            gain = models[against]["bits_per_byte"] - new
            passed = gain > minimum_gain or (against == "released" and released_before)
            rules.append(Rule(against, gain, minimum_gain, passed))
    if other_base_in_use:
        reason = "the adapter in use belongs to another base model; set `release: {other_base: true}` to replace it"
        return Verdict("keep", reason, tuple(rules))
    failed = [rule for rule in rules if not rule.passed]
    if failed:
        reason = "; ".join(
            f"{new:.4f} bits per byte is not better than the {rule.against}'s {new + rule.measured:.4f}"
            f" by more than {rule.threshold:g}"
            for rule in failed
        )
        return Verdict("keep", reason, tuple(rules))
    beaten = [f"the {rule.against}'s {new + rule.measured:.4f}" for rule in rules if rule.measured > minimum_gain]
    reason = f"{new:.4f} bits per byte on held-out chapters beats {' and '.join(beaten)}"
    if len(beaten) < len(rules):
        reason += "; it was in use before, and the reports are again what it was made from"
    return Verdict("release", reason, tuple(rules))
