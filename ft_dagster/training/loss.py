"""The loss over a large vocabulary, without holding the logits of all tokens at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256
"""Tokens whose logits are held at once: 50 MB in float32 over a vocabulary of 49,152. On two cores 128 to 512 took
the same time."""


def nats_and_hits(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, in nats, and whether it is the most probable token.

    Args:
        hidden: (M, hidden), what the output head reads at the tokens that predict.
        head: (vocabulary, hidden), the output head's weights.
        targets: (M), the tokens that come next.

    Returns:
        (M) float32 and (M) bool.
    """
    nats, hits = [hidden.new_empty(0, dtype=torch.float32)], [hidden.new_empty(0, dtype=torch.bool)]
    for chances, wanted, _ in _log_chances(hidden, head, targets):
        nats.append(_nats(chances, wanted))
        hits.append(-nats[-1] >= chances.amax(1))
    return torch.cat(nats), torch.cat(hits)


def summed_nats(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the (weighted) negative log-likelihoods, differentiable in `hidden`; the head is frozen.

    The gradient of the logits is their softmax less 1 at the target, so it is taken to `hidden` in the forward pass,
    chunk by chunk, and no logits are kept (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).

    Args:
        hidden: (M, hidden).
        head: (vocabulary, hidden), without gradient.
        targets: (M).
        weights: (M), what each token counts; 1 if not given.
    """
    return _SummedNats.apply(hidden, head, targets, weights)


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        for chances, wanted, here in _log_chances(hidden, head, targets):
            nats = _nats(chances, wanted)
            gradient = chances.exp_()  # the log-probabilities are not needed any more
            gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
            if weights is not None:
                nats = nats * weights[here]
                gradient.mul_(weights[here, None])
            total += nats.sum(dtype=torch.float64)
            torch.mm(gradient.to(head.dtype), head, out=of_hidden[here])
        ctx.of_hidden = of_hidden
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.of_hidden * gradients[0].to(ctx.of_hidden.dtype), None, None, None


def _log_chances(hidden: Tensor, head: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Log-probabilities (chunk, vocabulary) in float32, targets, and which tokens they are of."""
    for start in range(0, len(hidden), _CHUNK):
        here = slice(start, min(start + _CHUNK, len(hidden)))
        logits = torch.mm(hidden[here], head.t())
        yield torch.log_softmax(logits, dim=-1, dtype=torch.float32), targets[here], here


def _nats(log_chances: Tensor, targets: Tensor) -> Tensor:
    return -log_chances.gather(1, targets[:, None]).squeeze(1)
