"""Variants of computing a training step: as the recipe says, or with changes."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.gpu.timing import on_gpu
from ft_dagster.model.packed_model import PackedModel

VARLEN = "varlen"
"""Name under which `varlen_attention` is registered with transformers."""
_DROPOUT = 0.05


@dataclass(frozen=True)
class Variant:
    """A variant of training. The defaults are those of the shipped recipe `mistral-7b-qlora`."""

    rows: int = 1
    length: int = 2048
    """The number of tokens in a row."""
    dropout: bool = True
    checkpointing: bool = True
    half: bool | None = None
    """Whether norms, embedding and output head are in bfloat16 instead of float32. None leaves them as loaded: on a
    quantized base, peft casts them to float32."""
    attention: str = "sdpa"
    liger: bool = False
    """Whether to use Liger's kernels for norms, rotary embedding and MLP."""
    plain: bool = False
    """Whether to use transformers' own loss on rows that are not divided into pieces, as other tools do."""


def apply(packed: PackedModel, variant: Variant) -> None:
    """Apply a variant to a model. Another call undoes everything except Liger's kernels.

    Raises:
        RuntimeError: the variant uses Liger's kernels, and there is no GPU.
    """
    base = packed.base
    for layer in packed.model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = nn.Dropout(_DROPOUT) if variant.dropout else nn.Identity()
    around = [base.model.embed_tokens, base.model.norm, base.lm_head]
    around += [norm for layer in base.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    if variant.half is not None:
        for part in around:
            part.to(torch.bfloat16 if variant.half else torch.float32)
    set_attention(base, variant.attention)
    set_checkpointing(packed.model, variant.checkpointing)
    if variant.liger:
        use_liger(base, own_loss=variant.plain)


def set_checkpointing(model: Any, wanted: bool) -> None:
    if wanted:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def set_attention(base: Any, name: str) -> None:
    if name == VARLEN:
        AttentionInterface.register(VARLEN, varlen_attention)
    base.set_attn_implementation(name)


def use_liger(base: Any, own_loss: bool) -> None:
    if not on_gpu():
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_mistral

    apply_liger_kernel_to_mistral(fused_linear_cross_entropy=own_loss, model=base)


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """Compute causal attention within pieces with torch's varlen kernel; the signature is that of transformers.

    Args:
        query: (rows, heads, tokens, head size).
        key, value: (rows, key heads, tokens, head size).
        given: `position_ids` (rows, tokens), 0 at the start of each piece.

    Returns:
        (rows, tokens, heads, head size).
    """
    bounds, longest = _bounds(given["position_ids"])
    # (rows * tokens, heads, head size)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(torch.bfloat16) for x in (query, key, value))
    out = _varlen_on_gpu(q, k, v, bounds, longest) if on_gpu() else _varlen_on_cpu(q, k, v, bounds)
    return out.view(query.shape[0], query.shape[2], query.shape[1], -1).to(query.dtype), None


def _varlen_on_gpu(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # the parameters changed between torch 2.10 and 2.12
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)


def _varlen_on_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Compute the same piece by piece, because torch has no such kernel for a CPU."""

    def attend(*piece: Tensor) -> Tensor:
        one, two, three = (x.transpose(0, 1)[None] for x in piece)
        found = nn.functional.scaled_dot_product_attention(one, two, three, is_causal=True, enable_gqa=True)
        return found[0].transpose(0, 1)

    return torch.cat([attend(q[a:b], k[a:b], v[a:b]) for a, b in bounds.unfold(0, 2, 1).tolist()])


def _bounds(positions: Tensor) -> tuple[Tensor, int]:
    """Return the bounds of the pieces in the concatenated rows, int32 (pieces + 1), and the longest piece's length.

    They are cached on the tensor, which all layers share, because computing them waits for the device.
    """
    if not hasattr(positions, "bounds"):
        starts = (positions.flatten() == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([positions.numel()])]).int()
        positions.bounds = (bounds, int(bounds.diff().max()))
    return positions.bounds
