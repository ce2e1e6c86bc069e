"""Near copies among texts, and how much of the held-out text the train side contains, from samples of their runs."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from ft_dagster.dataset.held_out.outline import Outline
from ft_dagster.dataset.held_out.record import Split
from ft_dagster.dataset.held_out.shingles import SAMPLED, among

NEAR_COPY = 0.5
"""The share of its shingles that a text must have in common with another one to be its near copy."""


WARNING_SHARE = 0.05
"""The share of the held-out text that the train side may contain word for word without a warning. The chapters of one
report quote each other: of published reports, up to 5.6 %."""
BLOCKING_SHARE = 0.5
"""From this share on, measurements say more about memory than about the reports, so a run stops."""


def how_known(share: float) -> str:
    """Return what it means that the train side contains this share of the held-out text, and what to do."""
    return (
        f"{share:.1%} of the held-out text is on the train side, too, word for word, so measurements on it are too "
        "good. New chapters go to one side with their near copies, but a chapter that has a side keeps it. If you "
        "change tokens.held_out in the recipe, all sides are chosen anew, and the adapter is trained again."
    )


def contained(shingles: np.ndarray, known: np.ndarray) -> float:
    """Return the share of a text's shingles that are in `known`, which is sorted; 0 if the text has none."""
    return float(among(shingles, known).mean()) if len(shingles) else 0.0


def join_near_copies(texts: Sequence[np.ndarray]) -> list[int]:
    """Return for each text the index of the text that stands for it and its near copies.

    A text joins an earlier one if the earlier one and those that joined it have at least NEAR_COPY of its shingles.
    Give the largest text first: a small one may be a part of a large one, but not the other way round. The time is that
    of sorting all shingles.
    """
    count = len(texts)
    texts_of = np.repeat(np.arange(count), [len(one) for one in texts])
    values = np.concatenate([np.empty(0, dtype=np.uint64), *texts])
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    pairs, shared = np.unique(texts_of * count + texts_of[first][inverse], return_counts=True)
    stands = list(range(count))
    tally: Counter[int] = Counter()  # text that stands for others -> shingles in common with the present text
    for index, (pair, number) in enumerate(zip(pairs.tolist(), shared.tolist(), strict=True)):
        text, owner = divmod(pair, count)
        tally[stands[owner]] += number
        if index + 1 == len(pairs) or pairs[index + 1] // count != text:
            most = max(tally, key=lambda other: (tally[other], -other))
            if tally[most] >= NEAR_COPY * len(texts[text]):
                stands[text] = most
            tally.clear()
    return stands


def known_share(outline: Outline, split: Split) -> float:
    """Return the share of the held-out text that the train side contains word for word, as far as it is sampled."""
    kept = [numbers[held] for numbers, held in _by_side(outline, split)]
    held_out, counts = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *kept]), return_counts=True)
    if not len(held_out):
        return 0.0
    bits = min(26, len(held_out).bit_length() + 3)
    shift = np.uint64(64 - int(SAMPLED).bit_length() + 1 - bits)  # kept hashes are below 2**64 / SAMPLED
    occupied = np.zeros(2**bits, dtype=bool)
    occupied[held_out >> shift] = True
    found = np.zeros(len(held_out), dtype=bool)
    for numbers, held in _by_side(outline, split):
        likely = numbers[~held & occupied[numbers >> shift]]  # most of the others are recognized by their first bits
        places = np.searchsorted(held_out, likely).clip(max=len(held_out) - 1)
        found[places[held_out[places] == likely]] = True
    return float(counts[found].sum() / counts.sum())


def _by_side(outline: Outline, split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the shingles of each group, and for each whether it is held out."""
    for group in outline.groups():
        units = split.units_of([chapter.name for chapter in group.chapters])
        if any("#" in unit for unit in units):
            sides = [split.holds_out(row.chapter, row.title) for row in group.rows]
            counts = [row.shingles for row in group.rows]
        else:
            sides = [chapter.name in units for chapter in group.chapters]
            counts = [chapter.shingles for chapter in group.chapters]
        yield group.shingles, np.repeat(np.array(sides, dtype=bool), counts)
