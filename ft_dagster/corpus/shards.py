"""Groups of chapters that are stored and recomputed together, and remain stable when chapters are added or removed.

A chapter's place is the hash of its name. A group that grows beyond the limit is divided by the next bit of the hash (a
binary trie). The groups therefore depend only on the set of names, and adding or removing a chapter affects one group,
or two if it divides a group or joins two.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

LIMIT = 256
"""Maximum number of chapters in a group: a group can be rewritten in a fraction of a second, and groups stay few."""
_BITS = 64
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""A function that applies another one to items in order: `map`, or one that distributes the work over machines."""


def group_names(names: Iterable[str], limit: int = LIMIT) -> dict[str, list[str]]:
    """Return the names by group. A group's name is the bits that its members' hashes start with; "" for a single group.

    >>> group_names(["a", "b", "c"], limit=2)
    {'0': ['b', 'c'], '1': ['a']}
    """
    placed = sorted((hashlib.sha256(name.encode()).digest()[: _BITS // 8], name) for name in set(names))
    bits = [f"{int.from_bytes(place):0{_BITS}b}" for place, _ in placed]
    groups: dict[str, list[str]] = {}

    def divide(first: int, after: int, depth: int) -> None:
        if after - first <= limit or depth == _BITS:
            groups[bits[first][:depth]] = sorted(name for _, name in placed[first:after])
            return
        middle = next((i for i in range(first, after) if bits[i][depth] == "1"), after)
        for start, end in ((first, middle), (middle, after)):
            if start < end:
                divide(start, end, depth + 1)

    if placed:
        divide(0, len(placed), 0)
    return groups


def overlap(one: str, other: str) -> bool:
    """Whether two groups, possibly of different times, can have members in common."""
    return one.startswith(other) or other.startswith(one)
