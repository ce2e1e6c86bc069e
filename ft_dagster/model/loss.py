"""The loss over a large vocabulary, without holding the logits of all tokens at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Tokens whose logits are held at once: 100 MB in float32 over a vocabulary of 49,152. The head's weights are brought
into the processor's order anew for each chunk: of 128 tokens a product takes a fifth more time than of 512."""


def nats_and_hits(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target, in nats, and whether it is the most probable token.

    Args:
        hidden: (M, hidden), what the output head reads at the tokens that predict.
        head: (vocabulary, hidden), the output head's weights.
        targets: (M), the tokens that come next.
        chunk: tokens whose logits are held at once.

    Returns:
        (M) float32 and (M) bool.
    """
    nats, hits = [hidden.new_empty(0, dtype=torch.float32)], [hidden.new_empty(0, dtype=torch.bool)]
    for chances, wanted, _ in _log_chances(hidden, head, targets, chunk):
        nats.append(_nats(chances, wanted))
        hits.append(-nats[-1] >= chances.amax(1))
    return torch.cat(nats), torch.cat(hits)


def summed_nats(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the (weighted) negative log-likelihoods, differentiable in `hidden`; the head is frozen.

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
        total, ctx.of_hidden = nats_and_gradient(hidden, head, targets, weights)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.of_hidden * gradients[0].to(ctx.of_hidden.dtype), None, None, None


def nats_and_gradient(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The sum of `summed_nats` in float64, and its gradient, (M, hidden).

    The gradient of the logits is their softmax less 1 at the target, so it is taken to `hidden` at once, chunk by
    chunk, and no logits are kept (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    of_hidden = torch.empty_like(hidden)
    for chances, wanted, here in _log_chances(hidden, head, targets, chunk):
        nats = _nats(chances, wanted)
        gradient = chances.exp_()  # the log-probabilities are not needed any more
        gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
        if weights is not None:
            nats = nats * weights[here]
            gradient.mul_(weights[here, None])
        total += nats.sum(dtype=torch.float64)
        torch.mm(gradient.to(head.dtype), head, out=of_hidden[here])
    return total, of_hidden


def _log_chances(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Log-probabilities (chunk, vocabulary) in float32, targets, and which tokens they are of."""
    for start in range(0, len(hidden), chunk):
        here = slice(start, min(start + chunk, len(hidden)))
        logits = torch.mm(hidden[here], head.t())
        chances = logits if logits.dtype == torch.float32 else None  # in place
        yield torch.log_softmax(logits, -1, dtype=torch.float32, out=chances), targets[here], here


def _nats(log_chances: Tensor, targets: Tensor) -> Tensor:
    return -log_chances.gather(1, targets[:, None]).squeeze(1)
