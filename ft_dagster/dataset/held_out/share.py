"""Choosing groups of text so that the held-out share of all text comes near to the wanted one."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MOST_UNFILLED = 0.25
"""The share of the wanted bytes that is not filled up with small texts, if it is less than half of a usual one."""
_MOST_OF_A_CHAPTER = 0.5
"""Where sections are chosen, at most this share of a chapter is held out, unless the recipe's share is larger."""


class Group(NamedTuple):
    """Units that go to one side together, because they are near copies."""

    order: tuple[bool, int, float]
    """Where the group stands in the order in which units are held out."""
    units: tuple[str, ...]
    parts: Mapping[str, int]
    """Chapter -> its bytes in the group."""

    @property
    def size(self) -> int:
        return sum(self.parts.values())


def pick(
    sizes: Counter[str], groups: Sequence[Group], held: int, share: float, in_sections: bool = False
) -> list[Group]:
    """Return the groups that are held out, so that with the bytes that are already held out the share is near.

    Groups are taken in order while they fit, then the one that comes nearest. Something is always left to train on.

    Args:
        sizes: chapter -> bytes of all text.
        groups: the groups to choose from, in order.
        held: the bytes that are held out already.
        share: the wanted share of all text, between 0 and 1.
        in_sections: whether groups consist of sections, of which a chapter must keep enough.
    """
    total = sizes.total()
    wanted = share * total
    most = max(_MOST_OF_A_CHAPTER, share)
    taken: Counter[str] = Counter()
    picked: list[Group] = []
    gap = min(sum(group.size for group in groups) / max(1, len(groups)) / 2, _MOST_UNFILLED * wanted)

    def fits(group: Group) -> bool:
        """Whether something is left to train on, and enough of each chapter, unless the group is a whole chapter."""
        return held + group.size < total and not (
            in_sections
            and any(
                taken[name] + size > most * sizes[name] and size < sizes[name] for name, size in group.parts.items()
            )
        )

    for group in groups:
        if held > wanted - gap:
            return picked
        if held + group.size <= wanted * (1 + 1e-9) and fits(group):
            picked.append(group)
            taken.update(group.parts)
            held += group.size
    in_use = {group.units for group in picked}
    rest = [group for group in groups if group.units not in in_use and fits(group)]
    if rest:
        nearest = min(rest, key=lambda group: (distance(held + group.size, wanted), group.order))
        if distance(held + nearest.size, wanted) < distance(held, wanted):
            picked.append(nearest)
    return picked


def distance(held: int, wanted: float) -> float:
    """Return how far held-out bytes are from the wanted ones: half of them is as far as twice as many."""
    return abs(math.log(held / wanted)) if held else math.inf
