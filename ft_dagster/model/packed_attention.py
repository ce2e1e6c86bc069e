"""Attention within each piece of a packed row, and never between two of them: forward and backward.

Queries of a piece are taken in blocks, each with the keys up to its end: nearly half of a long piece's scores would be
masked, and are not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BLOCK = 128
"""Queries of a block, about."""


@dataclass
class Pieces:
    """How tokens in a row (N) fall into pieces, with what attention needs to know of them."""

    lengths: list[int]
    """Tokens of each piece; their sum is N."""
    cos: Tensor
    """(N, 1, half a head): rotary position embedding, by position in the piece."""
    sin: Tensor
    heads: int
    key_heads: int
    scale: float
    """What scores are multiplied with, 1 / sqrt(head size)."""
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        """Query heads that read the same key head (grouped-query attention, arXiv 2305.13245)."""
        return self.heads // self.key_heads

    def mask(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """For queries `begin` to `end` of a piece, once for each query head of a group, and the keys up to `end`.

        (shared * (end - begin), end): -inf where the key comes after the query.
        """
        if (begin, end) not in self.masks:
            causal = torch.full((end - begin, end), float("-inf"), dtype=dtype).triu_(begin + 1)
            self.masks[begin, end] = causal.repeat(self.shared, 1)
        return self.masks[begin, end]


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries begin and end in a piece of so many tokens.

    >>> list(blocks(300))
    [(0, 150), (150, 300)]
    """
    size = -(-length // max(1, round(length / _BLOCK)))
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves of a head as pairs: (N, heads, size) -> the same.

    The backward pass is the rotation by the opposite angle: `sin` with the other sign.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half])
    out[..., :half].addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:])
    out[..., half:].addcmul_(first, sin)
    return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> tuple[Tensor, list[Tensor]]:
    """Causal attention, piece by piece.

    Args:
        queries: (N, heads, size).
        keys: (N, key heads, size).
        values: like keys.
        pieces: of the row.

    Returns:
        (N, heads * size), and the probabilities of each block, (key heads, shared * queries, keys).
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
    """(length, heads, size) or (length, heads * size) -> (key heads, shared * length, size)."""
    grouped = x.view(len(x), pieces.key_heads, pieces.shared, -1).permute(1, 2, 0, 3)
    return grouped.reshape(pieces.key_heads, pieces.shared * len(x), -1)


def _write(out: Tensor, x: Tensor, pieces: Pieces) -> None:
    """The inverse of `_by_key_head`, into `out`."""
    length = len(out)
    target = out.view(length, pieces.key_heads, pieces.shared, -1)
    target.copy_(x.view(pieces.key_heads, pieces.shared, length, -1).permute(2, 0, 1, 3))
