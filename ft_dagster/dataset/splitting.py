"""Cutting a document that is longer than a block, at the best possible position."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ft_dagster.dataset.documents import Breaks

_SHARES = (0.5, 0.25, 0.25)
"""A piece that is cut before a heading must fill at least half a block; before a paragraph or a line, a quarter."""


@dataclass(frozen=True)
class Piece:
    """Tokens first..after of a document. Each piece except the first also contains the token before it as context.

    The context token is read and not supervised. This way, every token of the document except its very first is
    supervised exactly once.
    """

    first: int
    after: int
    context: int
    """Number of tokens before `first`, 0 or 1, that are read and not supervised."""

    @property
    def length(self) -> int:
        """Number of tokens that the piece takes in a block."""
        return self.after - self.first + self.context


def cut_positions(tokens_at: Callable[[Sequence[int]], list[int]], breaks: Breaks) -> list[list[int]]:
    """Return the token positions of the breaks, one sorted list per kind. Breaks inside a token are dropped.

    Args:
        tokens_at: returns the tokens that start at the given characters.
        breaks: the breaks of the text.
    """
    kinds = (breaks.headings, breaks.paragraphs, breaks.lines)
    return [[token for token in tokens_at(characters) if token] for characters in kinds]


def split_document(length: int, cuts: list[list[int]], block_length: int) -> list[Piece]:
    """Return pieces of at most `block_length` tokens that cover 0..length, with each token in one piece.

    >>> split_document(5, [[], [], []], 4)
    [Piece(first=0, after=4, context=0), Piece(first=4, after=5, context=1)]
    """
    pieces = []
    first = 0
    while first < length:
        context = int(first > 0)
        most = block_length - context
        after = length if length - first <= most else _best_cut(first, most, cuts)
        pieces.append(Piece(first, after, context))
        first = after
    return pieces


def _best_cut(first: int, most: int, cuts: list[list[int]]) -> int:
    for share, positions in zip(_SHARES, cuts, strict=True):
        index = bisect_right(positions, first + most) - 1
        if index >= 0 and positions[index] >= first + max(1, int(most * share)):
            return positions[index]
    return first + most
