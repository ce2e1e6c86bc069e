"""Measure how fast the large model trains, and in how much memory, from the shipped recipe to possible improvements."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import variants, world
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.timing import on_gpu, product_rate, seconds_of
from benchmarks.gpu.variants import VARLEN, Variant
from ft_dagster.model import load as loading
from ft_dagster.model.device import device
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.training.sizing.model_flops import flops_of_pieces
from ft_dagster.training.sizing.shape import shape_of

_LEAN = Variant(dropout=False, half=True, attention=VARLEN)
_FREE = Variant(dropout=False, half=True, checkpointing=False)
_BEST = replace(_LEAN, checkpointing=False, liger=True)
# Liger's kernels cannot be removed again, so variants with them come last.
NF4 = [
    ("as shipped", Variant()),
    ("dropout 0", Variant(dropout=False)),
    ("dropout 0, no checkpointing", Variant(dropout=False, checkpointing=False)),
    ("plain transformers and peft", Variant(dropout=False, plain=True)),
    ("dropout 0, half", Variant(dropout=False, half=True)),
    ("dropout 0, half, varlen", _LEAN),
    ("the same, 4 rows", replace(_LEAN, rows=4)),
    ("the same, 4 rows, liger", replace(_LEAN, rows=4, liger=True)),
    ("the same, no checkpointing", replace(_BEST, rows=4)),
    ("the same, 2 rows of 4096", replace(_BEST, rows=2, length=4096)),
    ("plain with liger", Variant(dropout=False, half=False, plain=True, liger=True)),
]
BF16 = [
    ("dropout 0", Variant(dropout=False, half=True)),
    ("no checkpointing", _FREE),
    ("plain transformers and peft", Variant(dropout=False, half=True, plain=True)),
    ("varlen, no checkpointing", replace(_FREE, attention=VARLEN)),
    ("varlen, liger, no checkpointing", _BEST),
    ("the same, 4 rows", replace(_BEST, rows=4)),
    ("the same, 2 rows of 4096", replace(_BEST, rows=2, length=4096)),
    ("plain with liger", Variant(dropout=False, half=True, plain=True, liger=True)),
]


def measure_nf4(setup: Setup, results: Results) -> None:
    """Measure all variants on a base in 4 bits."""
    _measure(setup, results, "speed-nf4", "nf4", NF4)


def measure_bf16(setup: Setup, results: Results) -> None:
    """Measure all variants on a base in bfloat16."""
    _measure(setup, results, "speed-bf16", "none", BF16)


def _measure(setup: Setup, results: Results, part: str, quantization: str, found: list[tuple[str, Variant]]) -> None:
    rate, began = product_rate(), time.monotonic()
    recipe = world.recipe(setup, Path("nowhere"), {"base.quantization": quantization, "base.dtype": "bfloat16"})
    packed = PackedModel(_model(setup, recipe, quantization).train(), recipe)
    results.add(part, "the model is made", seconds=time.monotonic() - began)
    for name, variant in found:
        if setup.wants(name):
            variant = replace(variant, length=variant.length // 32) if setup.tiny else variant
            with results.adding_failures(part, name):
                variants.apply(packed, variant)
                results.add(part, name, **_speed(packed, variant, recipe.lora.rank, rate))
            if on_gpu():
                torch.cuda.empty_cache()


def _model(setup: Setup, recipe: Any, quantization: str) -> Any:
    """Load the large model as training does, but with random weights made on the device instead of read from a disk."""

    def made(folder: str, **options: Any) -> Any:
        model = world.random_model(world.large_config(setup))
        return in_nf4(model) if quantization == "nf4" else model

    base: Any = SimpleNamespace(folder="nowhere", name="random")
    with patch.object(loading, "verify_base"), patch.object(loading.AutoModelForCausalLM, "from_pretrained", made):
        return loading.add_adapter(loading.load_base(base, recipe, None), base, recipe)


def _speed(packed: PackedModel, variant: Variant, rank: int, rate: float) -> dict[str, Any]:
    """Return tokens per second, peak memory of tensors and of the allocator, and MFU.

    MFU is the rate of operations that the model needs (without recomputation), divided by that of a large product.
    """
    config = packed.base.config
    rows = world.random_rows(variant.rows, variant.length, config.vocab_size)
    if variant.plain:
        rows = [world.as_one_piece(row) for row in rows]
    batch = world.batch(rows)
    predicted = int((batch["labels"] != -100).sum())

    def step() -> None:
        if variant.plain:
            with torch.autocast(device().type, dtype=torch.bfloat16):
                loss = packed.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        else:
            loss = packed.summed_nats(batch) / predicted
        loss.backward()
        packed.model.zero_grad()

    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step, 4, at_most=4.0)
    pieces = Counter(length for row in rows for length in row["lengths"])
    flops = flops_of_pieces(shape_of(config.to_dict()), pieces, predicted, rank)
    facts = {"tokens_per_second": round(variant.rows * variant.length / seconds), "MFU": flops / seconds / rate}
    if on_gpu():
        most = {"GiB": torch.cuda.max_memory_allocated(), "GiB_reserved": torch.cuda.max_memory_reserved()}
        facts |= {name: size / 2**30 for name, size in most.items()}
    return facts


def in_nf4(model: Any) -> Any:
    """Convert the weights of a model's layers to NF4, as bitsandbytes does on loading a base, and return the model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
                    low = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
                    options = {"quant_type": "nf4", "compress_statistics": True, "module": low}
                    low.weight = Params4bit(linear.weight.data, requires_grad=False, **options).to(linear.weight.device)
                    setattr(part, name, low)
    model.is_loaded_in_4bit = True
    return model
