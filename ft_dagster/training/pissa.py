"""PiSSA: a LoRA that starts from the principal components of the base's weights (arXiv 2404.02948).

The paper takes them out of the base, W = R + s B0 A0, and trains A and B on the residual R. Such an adapter belongs
to R, which nobody else has, and R rounded to bfloat16 is another model again. Here the base stays as it is, and the
adapter is what the paper's amounts to on W:

    R + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

This is a LoRA of twice the rank. Its first half is trained, its second half stays. The gradients of A and B are the
paper's; what is saved is what was trained; a checkpoint holds all that a resume needs; without the adapter the model
is the base.
"""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

ADAPTER = "default"


@torch.no_grad()
def start_from_principal_components(model: PeftModel, init: str) -> None:
    """Set the weights of a fresh adapter, whose rank is even, to [A0; A0] and [B0, -B0], and fix the second halves.

    Args:
        model: with the adapter; its base weights must not be quantized.
        init: `pissa`, or `pissa_niter_N` for a randomized decomposition in N iterations, which is several times faster.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (2r, in), (out, 2r)
            rank = len(down) // 2
            weight = layer.get_base_layer().weight.float()  # (out, in)
            left, values, right = _decompose(weight, rank, init)
            root = (values / layer.scaling[ADAPTER]).sqrt()  # (r)
            first = root[:, None] * right  # (r, in)
            last = left * root  # (out, r)
            down.copy_(torch.cat([first, first]))
            up.copy_(torch.cat([last, -last], dim=1))
            down.register_hook(lambda gradient, rank=rank: _without(gradient, 0, rank))
            up.register_hook(lambda gradient, rank=rank: _without(gradient, 1, rank))


def _decompose(weight: torch.Tensor, rank: int, init: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of (out, in) with their vectors: (out, r), (r), (r, in)."""
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
    return left, values, right.T


def _without(gradient: torch.Tensor, dimension: int, start: int) -> torch.Tensor:
    """The gradient, zero from `start` on."""
    kept = gradient.clone()
    kept.narrow(dimension, start, start).zero_()
    return kept
