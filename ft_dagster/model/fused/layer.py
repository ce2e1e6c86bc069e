"""A decoder layer of the Llama family with LoRA and a hand-written backward pass, several times faster on a CPU.

Autograd would store and copy every intermediate value, and compute in float32 what is only passed on. Here a layer
is eight large matrix products, forward and backward, and little else. Tokens form one sequence (N), without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ft_dagster.model.fused.lora_group import LoraGroup
from ft_dagster.model.fused.packed_attention import Pieces, attend, attend_backward, rotate


class FusedLayer:
    """A layer that computes the same as a LlamaDecoderLayer or MistralDecoderLayer, with the same parameters."""

    def __init__(self, layer: Any) -> None:
        """Take over the weights of a decoder layer, whose linear layers may have LoRA."""
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = LoraGroup([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = LoraGroup([attention.o_proj])
        self.gate_up = LoraGroup([mlp.gate_proj, mlp.up_proj])
        self.down = LoraGroup([mlp.down_proj])
        self.groups = (self.qkv, self.out, self.gate_up, self.down)
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)

    def load(self) -> list[nn.Parameter]:
        """Load the active adapters before a forward pass, and return their A and B in the order of the groups."""
        return [parameter for group in self.groups for parameter in group.load()]

    def forward(self, x: Tensor, pieces: Pieces) -> tuple[Tensor, "Kept"]:
        """Return the layer's output (N, hidden), and the values that its backward pass needs."""
        first, second = self.norms
        heads = pieces.heads + pieces.key_heads
        h, x_scale = normalize(x, first)
        qkv = self.qkv.forward(h)
        by_head = qkv[:, : self.qkv.out].unflatten(1, (heads + pieces.key_heads, -1))
        rotated = torch.empty(by_head[:, :heads].shape, dtype=x.dtype)
        rotate(by_head[:, :heads], pieces.cos, pieces.sin, out=rotated)
        values = by_head[:, heads:].contiguous()
        attended, probabilities = attend(rotated[:, : pieces.heads], rotated[:, pieces.heads :], values, pieces)
        out = self.out.forward(attended)
        middle = x + out[:, : self.out.out]
        h, middle_scale = normalize(middle, second)
        gate_up = self.gate_up.forward(h)
        width = self.gate_up.outs[0]
        activated = functional.silu(gate_up[:, :width])
        down = self.down.forward(activated * gate_up[:, width : 2 * width])
        kept = Kept(
            x_scale=x_scale,
            qkv_inner=qkv[:, self.qkv.out :].clone(),  # a view would keep all of the product in memory
            rotated=rotated,
            values=values,
            attended=attended,
            probabilities=probabilities,
            out_inner=out[:, self.out.out :].clone(),
            middle=middle,
            middle_scale=middle_scale,
            gate_up=gate_up,
            activated=activated,
            down_inner=down[:, self.down.out :].clone(),
        )
        return middle + down[:, : self.down.out], kept

    def backward(
        self, gradient: Tensor, x: Tensor, kept: "Kept", pieces: Pieces, to_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradient of the input (N, hidden) or None, and those of the adapters in the groups' order."""
        first, second = self.norms
        width = self.gate_up.outs[0]
        gate, up = kept.gate_up[:, :width], kept.gate_up[:, width : 2 * width]

        of_product, of_down = self.down.backward(
            _with_spare_columns(gradient, self.down), kept.activated * up, kept.down_inner
        )
        of_gate_up = torch.empty_like(kept.gate_up)
        torch.mul(of_product, kept.activated, out=of_gate_up[:, width : 2 * width])
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate_up[:, :width])
        h = _scaled(kept.middle, kept.middle_scale, second)
        of_h, of_gate_up_lora = self.gate_up.backward(of_gate_up, h, kept.gate_up[:, self.gate_up.out :])
        of_middle = normalize_backward(of_h, kept.middle, kept.middle_scale, second).add_(gradient).to(x.dtype)

        of_attended, of_out = self.out.backward(_with_spare_columns(of_middle, self.out), kept.attended, kept.out_inner)
        heads, queries = pieces.heads + pieces.key_heads, pieces.heads
        of_qkv = torch.empty(len(x), self.qkv.out + self.qkv.rank, dtype=x.dtype)
        by_head = of_qkv[:, : self.qkv.out].unflatten(1, (heads + pieces.key_heads, -1))
        of_rotated = torch.empty_like(kept.rotated)
        attend_backward(
            of_attended,
            kept.rotated[:, :queries],
            kept.rotated[:, queries:],
            kept.values,
            kept.probabilities,
            pieces,
            outs=(of_rotated[:, :queries], of_rotated[:, queries:], by_head[:, heads:]),
        )
        rotate(of_rotated, pieces.cos, -pieces.sin, out=by_head[:, :heads])
        h = _scaled(x, kept.x_scale, first)
        of_h, of_qkv_lora = self.qkv.backward(of_qkv, h, kept.qkv_inner, to_input)
        of_x = normalize_backward(of_h, x, kept.x_scale, first).add_(of_middle).to(x.dtype) if to_input else None
        return of_x, [*of_qkv_lora, *of_out, *of_gate_up_lora, *of_down]


@dataclass(frozen=True)
class Kept:
    """Values of the forward pass that the backward pass reads, for N tokens; their shapes are those in FusedLayer."""

    x_scale: Tensor
    qkv_inner: Tensor
    rotated: Tensor
    values: Tensor
    attended: Tensor
    probabilities: list[Tensor]
    out_inner: Tensor
    middle: Tensor
    middle_scale: Tensor
    gate_up: Tensor
    activated: Tensor
    down_inner: Tensor


def normalize(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Return RMSNorm (arXiv 1910.07467), rounded as in transformers, and 1 / root mean square, (N, 1) float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return _scaled(x, scale, norm), scale


def _scaled(x: Tensor, scale: Tensor, norm: Any) -> Tensor:
    return (x * scale).to(x.dtype).mul_(norm.weight)


def normalize_backward(gradient: Tensor, x: Tensor, scale: Tensor, norm: Any) -> Tensor:
    """Return the gradient of the input of `normalize`, in float32.

    With g = gradient * weight and s = scale it is s g - s^3 x mean(g x).
    """
    g = gradient * norm.weight
    shared = (g * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(scale.pow(3)).div_(x.shape[-1])
    return (g * scale).sub_(x * shared)


def _with_spare_columns(gradient: Tensor, group: LoraGroup) -> Tensor:
    """Return a copy of an output gradient, extended by the columns that LoraGroup.backward writes to."""
    extended = torch.empty(len(gradient), group.out + group.rank, dtype=gradient.dtype)
    extended[:, : group.out] = gradient
    return extended


def cannot_fuse(layers: Sequence[Any], longest: int) -> str | None:
    """Return why FusedLayer cannot compute these decoder layers, or None if it can.

    Args:
        layers: the decoder layers of the model.
        longest: the number of tokens in the longest piece that will occur.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

    for layer in layers:
        if not isinstance(layer, (LlamaDecoderLayer, MistralDecoderLayer)):
            return f"{type(layer).__name__} is not a layer of the Llama family"
        if not isinstance(layer.mlp.act_fn, nn.SiLU) and type(layer.mlp.act_fn).__name__ != "SiLUActivation":
            return f"its activation is {type(layer.mlp.act_fn).__name__}"
        window = getattr(layer.self_attn.config, "sliding_window", None)
        if window is not None and window < longest:
            return f"its sliding window of {window} tokens is shorter than a block"
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(module, LoraLinear):
                if module.lora_variant or any(isinstance(drop, nn.Dropout) for drop in module.lora_dropout.values()):
                    return "its adapter has dropout, or is not plain LoRA"
                module = module.base_layer
            if isinstance(module, nn.Linear) and (type(module) is not nn.Linear or module.bias is not None):
                return f"its linear layers are {type(module).__name__}, or have biases"
    return None
