"""Chapters in groups that stay the same while other chapters come and go: what is stored and made again together.

A chapter's place is the hash of its name. A group that grows beyond the limit is divided by the next bit of the
hash (a binary trie), so the groups depend on the set of names only, and a chapter that is added or removed touches
one group, or two when it divides one or joins two.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

LIMIT = 256
"""Chapters in a group, at most: small enough to be rewritten in a fraction of a second, few enough to count."""
_BITS = 64
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Applies a function to things, in their order: `map`, or what spreads them over machines."""


def group_names(names: Iterable[str], limit: int = LIMIT) -> dict[str, list[str]]:
    """Names by group; a group is called by the bits that its members' hashes begin with, the only one by "".

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
    """Whether two groups, perhaps of different times, can have members in common."""
    return one.startswith(other) or other.startswith(one)
