"""Linear layers that read the same input, as one matrix product together with their active LoRA adapters.

For layers W_i (out_i, in) with adapters A_i (r_i, in), B_i (out_i, r_i), one matrix contains the rows of all W_i and
below them those of all A_i. One product of the input with it gives every W_i x and every A_i x; a small product for
each adapter adds scale * B_i A_i x. The backward pass does the same in reverse. Frozen weights get no gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class _Part:
    """An active adapter of one layer."""

    parameters: tuple[nn.Parameter, nn.Parameter]
    """The trained parameters A (r, in) and B (out, r)."""
    scale: float
    up: Tensor
    """scale * B (out, r), in the dtype of the products."""
    outputs: slice
    """The layer's outputs, among those of all layers."""
    columns: slice
    """The columns of A x, among those of all active adapters."""


class LoraGroup:
    """The frozen weights of several layers in one tensor, and the products of their forward and backward pass."""

    def __init__(self, layers: list[Any]) -> None:
        """Take over the layers' weights, which become views of the group's own tensor, so that none is stored twice."""
        self.layers = layers
        weights = [_frozen(layer) for layer in layers]
        self.outs = [len(weight) for weight in weights]
        """The number of outputs of each layer."""
        self.out = sum(self.outs)
        self.rank = 0
        """The rank of all active adapters together: each has its own columns."""
        self._parts: list[_Part] = []
        ranks = sum(sum(layer.r.values()) for layer in layers if isinstance(layer, LoraLayer))
        first = weights[0]
        self._rows = torch.empty(self.out + ranks, first.shape[1], dtype=first.dtype)  # W_i, then A_i
        row = 0
        for weight in weights:
            self._rows[row : row + len(weight)] = weight.data
            weight.data = self._rows[row : row + len(weight)]
            row += len(weight)

    def load(self) -> list[nn.Parameter]:
        """Copy the active adapters next to the frozen weights; none if adapters are disabled.

        Returns:
            A and B of each adapter, in the order in which `backward` returns gradients.
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
        """Return the outputs of all layers side by side, followed by A x: (N, in) -> (N, out + r)."""
        outputs = torch.mm(x, self._weights.t())
        inner = outputs[:, self.out :]
        for part in self._parts:
            outputs[:, part.outputs].addmm_(inner[:, part.columns], part.up.t())
        return outputs

    def backward(self, gradient: Tensor, x: Tensor, down_x: Tensor, to_input: bool = True) -> tuple[Any, list[Tensor]]:
        """Return the gradients of the input and of the adapters.

        Args:
            gradient: the gradient of the outputs, (N, out + r); the last r columns are spare and get overwritten.
            x: the input of `forward`, (N, in).
            down_x: A x as `forward` returned it, (N, r).
            to_input: whether to compute the gradient of the input.

        Returns:
            The gradient of the input, (N, in), or None; and float32 gradients of the adapters in the order of `load`.
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
        """The rows of all W_i and of the active A_i, (out + r, in)."""
        return self._rows[: self.out + self.rank]


def _frozen(layer: Any) -> nn.Parameter:
    return (layer.base_layer if isinstance(layer, LoraLayer) else layer).weight
