"""Attention within each piece of a packed row, and never between two of them: forward and backward."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        """Query heads that read the same key head (grouped-query attention, arXiv 2305.13245)."""
        return self.heads // self.key_heads

    def mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """(shared * length, length): -inf above the diagonal, once for each query head of a group."""
        if length not in self.masks:
            causal = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
            self.masks[length] = causal.repeat(self.shared, 1)
        return self.masks[length]


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
        (N, heads * size), and the probabilities of each piece, (key heads, shared * length, length).
    """
    count, _, size = queries.shape
    outputs = torch.empty(count, pieces.heads * size, dtype=queries.dtype)
    probabilities = []
    start = 0
    for length in pieces.lengths:
        q = _by_key_head(queries[start : start + length], pieces)
        k, v = (x[start : start + length].transpose(0, 1) for x in (keys, values))
        scores = torch.baddbmm(pieces.mask(length, q.dtype), q, k.transpose(1, 2), alpha=pieces.scale)
        p = torch.softmax(scores, -1)
        _write(outputs[start : start + length], torch.bmm(p, v), pieces)
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
    start = 0
    for length, p in zip(pieces.lengths, probabilities, strict=True):
        here = slice(start, start + length)
        g, q = _by_key_head(gradient[here], pieces), _by_key_head(queries[here], pieces)
        k, v = keys[here].transpose(0, 1), values[here].transpose(0, 1)
        to_values[here] = torch.bmm(p.transpose(1, 2), g).transpose(0, 1)
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype).mul_(pieces.scale)
        _write(to_queries[here], torch.bmm(scores, k), pieces)
        to_keys[here] = torch.bmm(scores.transpose(1, 2), q).transpose(0, 1)
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
