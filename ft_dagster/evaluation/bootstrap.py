"""Confidence intervals for the difference between two models, which is measured on only a few chapters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Scored = Mapping[str, Mapping[str, tuple[float, int]]]
"""Chapter -> section -> nats and number of bytes of its text."""
_RESAMPLES = 2000
_SEED = 17


@dataclass(frozen=True)
class Gain:
    """Bits per byte that one model saves compared with another on the same text; negative if it needs more."""

    measured: float
    low: float
    """Lower end of the confidence interval."""
    high: float


def paired_gain(before: Scored, after: Scored, confidence: float) -> Gain:
    """Return what `after` gains over `before`, section by section, with a percentile bootstrap interval.

    Sections of a chapter are similar, so whole chapters are resampled, and then the sections within each (a two-stage
    cluster bootstrap; Davison & Hinkley, Bootstrap Methods and their Application, 3.8). With one or two chapters,
    resampling chapters alone would show nothing or false certainty, but the sections still vary. The interval tends to
    be too wide rather than too narrow. The seed is fixed, so that the same measurements give the same interval.

    Args:
        before: measurements of one model.
        after: measurements of the other model, on the same sections.
        confidence: share of such intervals that contain the true gain, such as 0.95.

    Raises:
        ValueError: the models were measured on different sections, or on none.

    >>> paired_gain({"a": {"x": (8.0, 4)}}, {"a": {"x": (4.0, 4)}}, 0.95).measured * math.log(2)
    1.0
    """
    if _names(before) != _names(after):
        raise ValueError("The two models were not measured on the same sections.")
    pairs = [[(before[name][key], after[name][key]) for key in sorted(before[name])] for name in sorted(before)]
    pairs = [chapter for chapter in pairs if sum(old[1] for old, _ in chapter)]
    if not pairs:
        raise ValueError("No text was measured.")
    nats = np.array([old[0] - new[0] for chapter in pairs for old, new in chapter])  # (sections)
    sizes = np.array([old[1] for chapter in pairs for old, _ in chapter], dtype=float)
    counts = np.array([len(chapter) for chapter in pairs])  # (chapters)
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    draw = np.random.default_rng(_SEED)
    gains = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        chapters = draw.integers(len(pairs), size=len(pairs))
        among = np.repeat(counts[chapters], counts[chapters])
        drawn = np.repeat(firsts[chapters], counts[chapters]) + (draw.random(len(among)) * among).astype(int)
        size = sizes[drawn].sum()
        gains[index] = nats[drawn].sum() / size if size else 0.0
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail]) / math.log(2)
    return Gain(float(nats.sum() / sizes.sum() / math.log(2)), float(low), float(high))


def _names(scored: Scored) -> dict[str, set[str]]:
    return {chapter: set(rows) for chapter, rows in scored.items()}
