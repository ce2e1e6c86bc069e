"""Cutting a document that is longer than a block, at the best place there is."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ft_dagster.dataset.documents import Breaks

_SHARES = (0.5, 0.25, 0.25)
"""A cut before a heading must leave at least half a block, before a paragraph or a line a quarter."""


@dataclass(frozen=True)
class Piece:
    """Tokens first..after of a document. A piece that is not the first also shows the token before it.

    That token is context: it is read and not supervised, so that every token of the document but its very first
    is supervised exactly once.
    """

    first: int
    after: int
    context: int
    """0 or 1 tokens before `first` that are read, not supervised."""

    @property
    def length(self) -> int:
        """Tokens it takes in a block."""
        return self.after - self.first + self.context


def cut_positions(tokens_at: Callable[[Sequence[int]], list[int]], breaks: Breaks) -> list[list[int]]:
    """Token positions of the breaks, one sorted list for each kind; a break inside a token is none.

    Args:
        tokens_at: the tokens that begin at given characters.
        breaks: of the text.
    """
    kinds = (breaks.headings, breaks.paragraphs, breaks.lines)
    return [[token for token in tokens_at(characters) if token] for characters in kinds]


def split_document(length: int, cuts: list[list[int]], block_length: int) -> list[Piece]:
    """Pieces of at most `block_length` tokens that cover 0..length, each token in one piece.

    >>> split_document(5, [[], [], []], 4)
    [Piece(first=0, after=4, context=0), Piece(first=4, after=5, context=1)]
    """
    pieces = []
    first = 0
    while first < length:
        context = int(first > 0)
        room = block_length - context
        after = length if length - first <= room else _best_cut(first, room, cuts)
        pieces.append(Piece(first, after, context))
        first = after
    return pieces


def _best_cut(first: int, room: int, cuts: list[list[int]]) -> int:
    for share, positions in zip(_SHARES, cuts, strict=True):
        index = bisect_right(positions, first + room) - 1
        if index >= 0 and positions[index] >= first + max(1, int(room * share)):
            return positions[index]
    return first + room
