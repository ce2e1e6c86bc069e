"""Linear layers that read the same input, as one matrix product with the LoRA adapters in use.

For layers W_i (out_i, in) with adapters A_i (r_i, in), B_i (out_i, r_i), the rows of all W_i and below them those of
all A_i stand in one matrix. One product of the input with it gives every W_i x and every A_i x; a small product for
each adapter adds scale * B_i A_i x. Backward is the same the other way round. Frozen weights get no gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class _Part:
    """An adapter in use."""

    parameters: tuple[nn.Parameter, nn.Parameter]
    """A (r, in) and B (out, r), as they are trained."""
    scale: float
    up: Tensor
    """scale * B, in the dtype of the products."""
    outputs: slice
    """Of its layer, among those of all layers."""
    columns: slice
    """Of A x, among those of all adapters in use."""


class LoraGroup:
    """The frozen weights of some layers in one tensor, and the products of the forward and the backward pass."""

    def __init__(self, layers: list[Any]) -> None:
        """Take the layers' weights over: they become views of the group's own tensor, so that none is held twice."""
        self.layers = layers
        weights = [_frozen(layer) for layer in layers]
        self.outs = [len(weight) for weight in weights]
        """Outputs of each layer."""
        self.out = sum(self.outs)
        self.rank = 0
        """Of all adapters in use together: each has columns of its own."""
        self._parts: list[_Part] = []
        room = sum(sum(layer.r.values()) for layer in layers if isinstance(layer, LoraLayer))
        first = weights[0]
        self._rows = torch.empty(self.out + room, first.shape[1], dtype=first.dtype)  # W_i, then A_i
        row = 0
        for weight in weights:
            self._rows[row : row + len(weight)] = weight.data
            weight.data = self._rows[row : row + len(weight)]
            row += len(weight)

    def load(self) -> list[nn.Parameter]:
        """Copy the adapters in use to where the products find them; none if adapters are disabled.

        Returns:
            A and B of each, in the order that `backward` gives gradients in.
        """
        self._parts, self.rank = [], 0
        row = 0
        for layer, out in zip(self.layers, self.outs, strict=True):
            for name in layer.active_adapters if isinstance(layer, LoraLayer) and not layer.disable_adapters else ():
                if name in layer.r:
                    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                    columns = slice(self.rank, self.rank + len(down))
                    self._rows[self.out + columns.start : self.out + columns.stop] = down.detach()
                    scaled = (up.detach() * layer.scaling[name]).to(self._rows.dtype)
                    part = _Part((down, up), layer.scaling[name], scaled, slice(row, row + out), columns)
                    self._parts.append(part)
                    self.rank += len(down)
            row += out
        return [matrix for part in self._parts for matrix in part.parameters]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all layers side by side, and behind them A x: (N, in) -> (N, out + r)."""
        outputs = torch.mm(x, self._weights.t())
        inner = outputs[:, self.out :]
        for part in self._parts:
            outputs[:, part.outputs].addmm_(inner[:, part.columns], part.up.t())
        return outputs

    def backward(self, gradient: Tensor, x: Tensor, down_x: Tensor, to_input: bool = True) -> tuple[Any, list[Tensor]]:
        """Gradients with respect to the input and to the adapters.

        Args:
            gradient: (N, out + r), filled in by the caller for the outputs; the last r columns are overwritten.
            x: (N, in), what `forward` was given.
            down_x: (N, r), A x, as `forward` returned it.
            to_input: whether the gradient of the input is wanted.

        Returns:
            (N, in) or None, and float32 gradients in the order of `load`.
        """
        inner = gradient[:, self.out :]
        for part in self._parts:
            torch.mm(gradient[:, part.outputs], part.up, out=inner[:, part.columns])
        all_down = inner.t() @ x  # (r, in)
        gradients = []
        for part in self._parts:
            up = gradient[:, part.outputs].t() @ down_x[:, part.columns]  # (out of the layer, r of the adapter)
            gradients.append(all_down[part.columns].float())
            gradients.append(up.float().mul_(part.scale))
        return (torch.mm(gradient, self._weights) if to_input else None), gradients

    @property
    def _weights(self) -> Tensor:
        """(out + r, in)"""
        return self._rows[: self.out + self.rank]


def _frozen(layer: Any) -> nn.Parameter:
    return (layer.base_layer if isinstance(layer, LoraLayer) else layer).weight
