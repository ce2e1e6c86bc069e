"""The loss over a large vocabulary, computed without keeping the logits of all tokens in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Tokens whose logits are in memory at once: 100 MB in float32 for a vocabulary of 49,152. The head's weights are
reordered for the processor for each chunk, so that a product takes a fifth more time with 128 tokens than with 512."""


def nats_and_hits(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each target, in nats, and whether it is the most probable token.

    Args:
        hidden: the output head's input at the tokens that predict the targets, (M, hidden).
        head: the output head's weights, (vocabulary, hidden).
        targets: the tokens that come next, (M).
        chunk: the number of tokens whose logits are in memory at once.

    Returns:
        (M) float32 and (M) bool.
    """
    nats, hits = [hidden.new_empty(0, dtype=torch.float32)], [hidden.new_empty(0, dtype=torch.bool)]
    for chances, wanted, _ in _log_chances(hidden, head, targets, chunk):
        nats.append(_nats(chances, wanted))
        hits.append(-nats[-1] >= chances.amax(1))
    return torch.cat(nats), torch.cat(hits)


def summed_nats(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of the (weighted) negative log-likelihoods, differentiable in `hidden`; the head is frozen.

    Args:
        hidden: the output head's input, (M, hidden).
        head: the output head's weights, (vocabulary, hidden), which get no gradient.
        targets: the tokens that come next, (M).
        weights: the weight of each token, (M); 1 by default.
    """
    return _SummedNats.apply(hidden, head, targets, weights)


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        total, ctx.of_hidden = nats_and_gradient(hidden, head, targets, weights)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.of_hidden * gradients[0].to(ctx.of_hidden.dtype), None, None, None


def nats_and_gradient(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the sum of `summed_nats` in float64, and its gradient with respect to `hidden`, (M, hidden).

    The gradient of the logits is their softmax minus 1 at the target. It is propagated to `hidden` immediately, chunk
    by chunk, so no logits are kept (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    of_hidden = torch.empty_like(hidden)
    for chances, wanted, here in _log_chances(hidden, head, targets, chunk):
        nats = _nats(chances, wanted)
        gradient = chances.exp_()  # the log-probabilities are no longer needed
        gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
        if weights is not None:
            nats = nats * weights[here]
            gradient.mul_(weights[here, None])
        total += nats.sum(dtype=torch.float64)
        torch.mm(gradient.to(head.dtype), head, out=of_hidden[here])
    return total, of_hidden


def _log_chances(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield log-probabilities (chunk, vocabulary) in float32 with their targets and their slice of the tokens."""
    for start in range(0, len(hidden), chunk):
        here = slice(start, min(start + chunk, len(hidden)))
        logits = torch.mm(hidden[here], head.t())
        chances = logits if logits.dtype == torch.float32 else None  # in place
        yield torch.log_softmax(logits, -1, dtype=torch.float32, out=chances), targets[here], here


def _nats(log_chances: Tensor, targets: Tensor) -> Tensor:
    return -log_chances.gather(1, targets[:, None]).squeeze(1)
