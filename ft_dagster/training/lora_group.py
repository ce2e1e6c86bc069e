"""Linear layers that read the same input, as one matrix product with all their LoRA adapters.

For layers W_i (out_i, in) with adapters A_i (r_i, in), B_i (out_i, r_i), the rows of all W_i and below them those of
all A_i stand in one matrix. One product of the input with it gives every W_i x and every A_i x; one small product
more adds scale * B_i A_i x. Backward is the same the other way round. Frozen weights get no gradient.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class LoraGroup:
    """The frozen weights of some layers in one tensor, and the products of the forward and the backward pass."""

    def __init__(self, layers: list[Any]) -> None:
        """Take the layers' weights over: they become views of the group's own tensor, so that none is held twice."""
        self.layers = layers
        weights = [_frozen(layer) for layer in layers]
        self.outs = [len(weight) for weight in weights]
        """Outputs of each layer."""
        self.out = sum(self.outs)
        self.rank = sum(sum(layer.r.values()) for layer in layers if isinstance(layer, LoraLayer))
        """Of all adapters of all layers together: each has columns of its own."""
        first = weights[0]
        self._down = torch.zeros(self.out + self.rank, first.shape[1], dtype=first.dtype)  # (out + r, in)
        self._up = torch.zeros(self.out, self.rank, dtype=first.dtype)  # (out, r), scale * B_i on its diagonal
        row = 0
        for weight in weights:
            self._down[row : row + len(weight)] = weight.data
            weight.data = self._down[row : row + len(weight)]
            row += len(weight)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each layer whose adapter is in use, in the order that `backward` gives gradients in."""
        return [matrix for part in self._parts() for matrix in part[0]]

    def load(self) -> None:
        """Copy the adapter in use to where the products find it; none if adapters are disabled."""
        self._down[self.out :] = 0
        self._up.zero_()
        for (down, up), scale, (row, column) in self._parts():
            self._down[self.out + column : self.out + column + len(down)] = down.detach()
            self._up[row : row + len(up), column : column + len(down)] = up.detach() * scale

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all layers side by side, and behind them A x: (N, in) -> (N, out + r)."""
        outputs = torch.mm(x, self._down.t())
        outputs[:, : self.out].addmm_(outputs[:, self.out :], self._up.t())
        return outputs

    def backward(self, gradient: Tensor, x: Tensor, down_x: Tensor, to_input: bool = True) -> tuple[Any, list[Tensor]]:
        """Gradients with respect to the input and to the adapters.

        Args:
            gradient: (N, out + r), filled in by the caller for the outputs; the last r columns are overwritten.
            x: (N, in), what `forward` was given.
            down_x: (N, r), A x, as `forward` returned it.
            to_input: whether the gradient of the input is wanted.

        Returns:
            (N, in) or None, and float32 gradients in the order of `parameters`.
        """
        outputs = gradient[:, : self.out]
        inner = torch.mm(outputs, self._up, out=gradient[:, self.out :])
        all_down = inner.t() @ x  # (r, in)
        all_up = outputs.t() @ down_x  # (out, r)
        gradients = []
        for (down, up), scale, (row, column) in self._parts():
            gradients.append(all_down[column : column + len(down)].float())
            gradients.append(all_up[row : row + len(up), column : column + len(down)].float().mul_(scale))
        return (torch.mm(gradient, self._down) if to_input else None), gradients

    def _parts(self) -> list[tuple[tuple[nn.Parameter, nn.Parameter], float, tuple[int, int]]]:
        """(A, B), scale, and where the layer's outputs and its rank begin, of each layer with an adapter in use."""
        parts = []
        row = column = 0
        for layer, out in zip(self.layers, self.outs, strict=True):
            for name, rank in layer.r.items() if isinstance(layer, LoraLayer) else ():
                if name in layer.active_adapters and not layer.disable_adapters:
                    pair = (layer.lora_A[name].weight, layer.lora_B[name].weight)
                    parts.append((pair, layer.scaling[name], (row, column)))
                column += rank
            row += out
        return parts


def _frozen(layer: Any) -> nn.Parameter:
    return (layer.base_layer if isinstance(layer, LoraLayer) else layer).weight
