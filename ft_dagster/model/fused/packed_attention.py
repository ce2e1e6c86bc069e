"""Attention within each piece of a packed row, and never between pieces: forward and backward pass.

The queries of a piece are processed in blocks, each with the keys up to the block's end. So the masked scores, nearly
half of those of a long piece, are mostly not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BLOCK = 128
"""The approximate number of queries in a block."""


@dataclass
class Pieces:
    """How the N tokens of a row are divided into pieces, with the other inputs of attention."""

    lengths: list[int]
    """The number of tokens in each piece; the sum is N."""
    cos: Tensor
    """Cosines of the rotary position embedding, by position in the piece, (N, 1, half a head); `sin` is alike."""
    sin: Tensor
    heads: int
    key_heads: int
    scale: float
    """The factor of the scores, 1 / sqrt(head size)."""
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        """The number of query heads that share a key head (grouped-query attention, arXiv 2305.13245)."""
        return self.heads // self.key_heads

    def mask(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return the causal mask of queries `begin` to `end` of a piece and the keys up to `end`.

        Its shape is (shared * (end - begin), end), as it is repeated for each query head of a group. It is -inf where
        the key comes after the query, and 0 elsewhere.
        """
        if (begin, end) not in self.masks:
            causal = torch.full((end - begin, end), float("-inf"), dtype=dtype).triu_(begin + 1)
            self.masks[begin, end] = causal.repeat(self.shared, 1)
        return self.masks[begin, end]


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each block of queries in a piece of `length` tokens.

    >>> list(blocks(300))
    [(0, 150), (150, 300)]
    """
    size = -(-length // max(1, round(length / _BLOCK)))
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write the rotary position embedding (arXiv 2104.09864) of `x`, (N, heads, size), to `out`, and return `out`.

    The two halves of a head form the pairs that are rotated. The backward pass is the rotation by the opposite angle:
    the same function with `-sin`.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half])
    out[..., :half].addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:])
    out[..., half:].addcmul_(first, sin)
    return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> tuple[Tensor, list[Tensor]]:
    """Compute causal attention, piece by piece.

    Args:
        queries: (N, heads, size).
        keys: (N, key heads, size).
        values: (N, key heads, size).
        pieces: the pieces of the row.

    Returns:
        The outputs, (N, heads * size), and the probabilities of each block, (key heads, shared * queries, keys).
    """
    count, _, size = queries.shape
    outputs = torch.empty(count, pieces.heads * size, dtype=queries.dtype)
    probabilities = []
    start = 0
    for length in pieces.lengths:
        k, v = (x[start : start + length].transpose(0, 1) for x in (keys, values))  # (key heads, length, size)
        for begin, end in blocks(length):
            here = slice(start + begin, start + end)
            q, mask = _by_key_head(queries[here], pieces), pieces.mask(begin, end, queries.dtype)
            scores = torch.baddbmm(mask, q, k[:, :end].transpose(1, 2), alpha=pieces.scale)
            p = torch.softmax(scores, -1, out=scores)
            _write(outputs[here], torch.bmm(p, v[:, :end]), pieces)
            probabilities.append(p)
        start += length
    return outputs, probabilities


def attend_backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    probabilities: list[Tensor],
    pieces: Pieces,
    outs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of queries, keys and values to `outs`, given the gradient of the outputs of `attend`."""
    to_queries, to_keys, to_values = outs
    start, remaining = 0, iter(probabilities)
    for length in pieces.lengths:
        piece = slice(start, start + length)
        k, v = keys[piece].transpose(0, 1), values[piece].transpose(0, 1)  # (key heads, length, size)
        of_keys, of_values = k.new_zeros(k.shape), v.new_zeros(v.shape)
        for begin, end in blocks(length):
            here, p = slice(start + begin, start + end), next(remaining)
            g, q = _by_key_head(gradient[here], pieces), _by_key_head(queries[here], pieces)
            of_values[:, :end].baddbmm_(p.transpose(1, 2), g)
            scores = torch._softmax_backward_data(torch.bmm(g, v[:, :end].transpose(1, 2)), p, -1, p.dtype)
            scores.mul_(pieces.scale)
            _write(to_queries[here], torch.bmm(scores, k[:, :end]), pieces)
            of_keys[:, :end].baddbmm_(scores.transpose(1, 2), q)
        to_keys[piece], to_values[piece] = of_keys.transpose(0, 1), of_values.transpose(0, 1)
        start += length


def _by_key_head(x: Tensor, pieces: Pieces) -> Tensor:
    """Reorder (length, heads, size) or (length, heads * size) to (key heads, shared * length, size)."""
    grouped = x.view(len(x), pieces.key_heads, pieces.shared, -1).permute(1, 2, 0, 3)
    return grouped.reshape(pieces.key_heads, pieces.shared * len(x), -1)


def _write(out: Tensor, x: Tensor, pieces: Pieces) -> None:
    """Write the inverse of `_by_key_head` to `out`."""
    length = len(out)
    target = out.view(length, pieces.key_heads, pieces.shared, -1)
    target.copy_(x.view(pieces.key_heads, pieces.shared, length, -1).permute(2, 0, 1, 3))
