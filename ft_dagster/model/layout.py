"""How the pieces of a row are given to a model: packed one after another, or each as a padded row of its own.

Pieces of a packed row must not see each other. Positions that restart with each piece are all that says where a piece
begins; attention of most models follows them, but some build their mask without them, and recurrent and convolution
layers ignore them. Such a model gets each piece as a row of its own, padded on the right, which is right for every
causal model: no token sees what comes after it.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_TOKENS = 48
"""Tokens of each piece that the probe tries."""

Nats = Callable[[Mapping[str, Tensor]], Tensor]
"""A function that returns each token's negative log-likelihood (B, T) for a batch as `collate` makes it."""


def largest_leak(nats: Nats, vocabulary: int, device: torch.device) -> float:
    """Return by how many nats the loss of a piece's tokens changes when the piece before it in the row changes.

    The tokens are arbitrary, and the random state is left as it is.

    Args:
        nats: the model's losses of packed rows.
        vocabulary: the number of tokens that the model knows.
        device: the device of the model.
    """
    numbers = torch.arange(3 * _TOKENS, device=device) * 7919 % vocabulary
    first, other, second = numbers.split(_TOKENS)

    def losses(before: Tensor) -> Tensor:
        ids = torch.cat([before, second])[None]
        positions = torch.arange(_TOKENS, device=device).repeat(2)[None]
        labels = ids.masked_fill(positions == 0, -100)
        lengths = torch.tensor([2 * _TOKENS])
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "row_lengths": lengths}
        return nats(batch)[0, _TOKENS:]

    return float((losses(first) - losses(other)).abs().max())


def padded_rows(position_ids: Tensor, input_ids: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Divide packed rows into their pieces, padded on the right to the longest of each group of similar pieces.

    A group has at most as many tokens as the batch, padding included.

    Args:
        position_ids: positions, which restart at 0 with each piece; int64, (B, T).
        input_ids: tokens; int64, (B, T).

    Yields:
        `input_ids` and `attention_mask` of a group, int64 (P, L), and for each of its places the index of its token
        in the batch as one row of B x T; -1 for padding.
    """
    flat = input_ids.flatten()
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([len(flat)], device=starts.device))
    order = lengths.argsort(stable=True).tolist()
    sizes, first = lengths.tolist(), 0
    while first < len(order):
        after = first + 1  # pieces in ascending order of length: the last one decides the width
        while after < len(order) and (after + 1 - first) * sizes[order[after]] <= len(flat):
            after += 1
        chosen = torch.tensor(order[first:after], device=flat.device)
        places = torch.arange(sizes[order[after - 1]], device=flat.device)  # (L)
        inside = places < lengths[chosen][:, None]  # (P, L)
        index = torch.where(inside, starts[chosen][:, None] + places, -1)
        ids = torch.where(inside, flat[index.clamp(min=0)], flat[0])
        yield {"input_ids": ids, "attention_mask": inside.long()}, index
        first = after
