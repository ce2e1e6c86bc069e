"""Fused layers, the last norm and the loss as one autograd function, which computes the rows of a batch in parallel.

Each thread computes its own rows, from their embeddings to their loss and back. Threads that share every product
and every element-wise operation wait for each other a thousand times per batch; here they synchronize twice.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ft_dagster.model.fused.layer import FusedLayer, Kept, normalize, normalize_backward
from ft_dagster.model.fused.packed_attention import Pieces
from ft_dagster.model.loss import CHUNK, nats_and_gradient, nats_and_hits

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Share:
    """Rows of a batch that are computed together as one sequence of N tokens, M of which predict a token."""

    x: Tensor
    """Embeddings, (N, hidden)."""
    pieces: Pieces
    chosen: Tensor
    """Which tokens predict one, (N) bool."""
    targets: Tensor
    """The tokens to predict, (M)."""
    weights: Tensor | None
    """The weight of each target in the loss, (M); None if all count the same."""


@dataclass
class _Done:
    """The values that the backward pass of a share needs."""

    pieces: Pieces
    chosen: Tensor
    inputs: list[Tensor]
    """The inputs of each layer, and of the last norm."""
    kept: list[Kept | None]
    of_hidden: Tensor
    """The gradient of the output head's input, (M, hidden)."""
    scale: Tensor
    """The scale of the last norm, as `normalize` returns it."""


class FusedModel:
    """The decoder layers of a model, its last norm, and the loss."""

    def __init__(self, layers: Sequence[Any], norm: Any, recompute: bool) -> None:
        """Take over the weights of decoder layers for which `cannot_fuse` returns None.

        Args:
            layers: the decoder layers of the model.
            norm: the norm after the last layer.
            recompute: whether only each layer's input is kept until the backward pass (gradient checkpointing).
        """
        self.layers = [FusedLayer(layer) for layer in layers]
        self.norm = norm
        self.recompute = recompute

    def summed_nats(self, shares: Sequence[Share], head: Tensor) -> Tensor:
        """Return the sum of the (weighted) negative log-likelihoods, differentiable in the active adapters.

        Args:
            shares: the shares of a batch.
            head: the output head's weights, (vocabulary, hidden).
        """
        parameters = [parameter for layer in self.layers for parameter in layer.load()]
        return _SummedNats.apply(self, shares, head, *parameters)

    def nats_and_hits(self, shares: Sequence[Share], head: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `loss.nats_and_hits` returns, for all tokens of the shares that predict one."""
        for layer in self.layers:
            layer.load()

        def score(share: Share) -> tuple[Tensor, Tensor]:
            x = share.x
            for layer in self.layers:
                x = layer.forward(x, share.pieces)[0]
            hidden, _ = normalize(x[share.chosen], self.norm)
            return nats_and_hits(hidden, head, share.targets, CHUNK // len(shares))

        nats, hits = zip(*side_by_side(score, shares), strict=True)
        return torch.cat(nats), torch.cat(hits)

    def forward(self, share: Share, head: Tensor, chunk: int) -> tuple[Tensor, _Done]:
        """Return the summed loss of a share, float64, and the values that its backward pass needs."""
        x, inputs, kept = share.x, [], []
        for layer in self.layers:
            inputs.append(x)
            x, values = layer.forward(x, share.pieces)
            kept.append(None if self.recompute else values)
        x = x[share.chosen]
        hidden, scale = normalize(x, self.norm)
        total, of_hidden = nats_and_gradient(hidden, head, share.targets, share.weights, chunk)
        return total, _Done(share.pieces, share.chosen, [*inputs, x], kept, of_hidden, scale)

    def backward(self, done: _Done, factor: Tensor) -> list[Tensor]:
        """Return the gradients of the adapters, in the order of the layers. Kept values are freed on the way.

        Args:
            done: the values that `forward` kept.
            factor: the gradient of the sum.
        """
        of_hidden = done.of_hidden.mul_(factor.to(done.of_hidden.dtype))
        last = normalize_backward(of_hidden, done.inputs.pop(), done.scale, self.norm)
        gradient: Any = torch.zeros(len(done.chosen), last.shape[1], dtype=of_hidden.dtype)
        gradient[done.chosen] = last.to(of_hidden.dtype)
        found = []
        for index in reversed(range(len(self.layers))):
            layer, x, kept = self.layers[index], done.inputs.pop(), done.kept.pop()
            if kept is None:
                _, kept = layer.forward(x, done.pieces)
            gradient, of_parameters = layer.backward(gradient, x, kept, done.pieces, to_input=index > 0)
            found.append(of_parameters)
        return [of_parameter for of_parameters in reversed(found) for of_parameter in of_parameters]


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: FusedModel, shares: Sequence[Share], head: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        del parameters  # arguments so that autograd asks for their gradients; the layers read them directly
        chunk = CHUNK // len(shares)
        totals, done = zip(*side_by_side(lambda share: model.forward(share, head, chunk), shares), strict=True)
        ctx.model, ctx.done = model, done
        return torch.stack(totals).sum().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        model, done = ctx.model, ctx.done
        ctx.done = None  # it is large, and not needed afterwards
        found = side_by_side(lambda share: model.backward(share, gradients[0]), done)
        for others in found[1:]:
            for gradient, other in zip(found[0], others, strict=True):
                gradient.add_(other)
        return None, None, None, *found[0]


def count_shares(rows: int, threads: int) -> int:
    """Return how many shares to divide rows into.

    It is the largest divisor of `threads` that is not above the number of rows, so that no thread is idle.

    >>> count_shares(rows=2, threads=8), count_shares(rows=4, threads=2), count_shares(rows=2, threads=3)
    (2, 2, 1)
    """
    return max(count for count in range(1, min(rows, threads) + 1) if threads % count == 0)


def side_by_side(function: Callable[[T], R], shares: Sequence[T]) -> list[R]:
    """Return a function's results for all shares, computed in parallel, with equal threads and without gradients."""
    if len(shares) == 1:
        with torch.no_grad():
            return [function(shares[0])]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // len(shares))  # the setting that new threads start with
    try:
        with ThreadPoolExecutor(len(shares)) as pool:
            return list(pool.map(torch.no_grad()(function), shares))
    finally:
        torch.set_num_threads(threads)
