"""Measure the machine's maximum rates, with which training is compared."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu import world
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.timing import on_gpu, product_rate, seconds_of
from benchmarks.gpu.variants import varlen_attention
from ft_dagster.model.device import device, device_name

PART = "ceilings"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "triton")
_ROWS = 4
Product = Callable[[Tensor, Tensor], Callable[[], Tensor]]


def measure(setup: Setup, results: Results) -> None:
    """Add library versions, and rates of products by number format, memory, NF4 decoding, and packed attention."""
    results.add(PART, device_name(), cuda=torch.version.cuda, **{name: _version(name) for name in LIBRARIES})
    results.add(PART, "bfloat16 product, square", TFLOPs=product_rate() / 1e12)
    tokens, hidden, wide, vocabulary = (256, 256, 1024, 1024) if setup.tiny else (8192, 4096, 28672, 32000)
    products: list[tuple[str, int, int, torch.dtype, Product]] = [
        ("bfloat16 product, gate and up", tokens, wide, torch.bfloat16, _plain),
        ("float8 product, gate and up", tokens, wide, torch.bfloat16, _float8),
        ("float32 product, output head", 256, vocabulary, torch.float32, _plain),
        ("bfloat16 product, output head", 256, vocabulary, torch.bfloat16, _plain),
    ]
    for name, rows, outputs, dtype, product in products:
        with results.adding_failures(PART, name):
            x, w = (torch.randn(size, hidden, device=device()).to(dtype) for size in (rows, outputs))
            results.add(PART, name, TFLOPs=2 * rows * hidden * outputs / seconds_of(product(x, w), 20) / 1e12)
    source = torch.randn(2**29 if on_gpu() else 2**22, device=device())
    target = torch.empty_like(source)
    results.add(PART, "copy", GBps=2 * source.nbytes / seconds_of(lambda: target.copy_(source), 10) / 1e9)
    with results.adding_failures(PART, "NF4 to bfloat16"):
        results.add(PART, "NF4 to bfloat16", **_nf4(wide // 2, hidden))
    _attention(setup, tokens, results)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _plain(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    return lambda: x @ w.t()


def _float8(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """Return a product with a scale for each row and column. All are 1, which takes as long as other values."""
    low = [tensor.to(torch.float8_e4m3fn) for tensor in (x, w)]
    scales = {"scale_a": torch.ones(len(x), 1, device=device()), "scale_b": torch.ones(1, len(w), device=device())}
    return lambda: torch._scaled_mm(low[0], low[1].t(), out_dtype=torch.bfloat16, **scales)


def _nf4(outputs: int, inputs: int) -> dict[str, float]:
    """Measure decoding of one weight, for which half a byte per number is read and two bytes are written."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(outputs, inputs, device=device()).bfloat16()
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    seconds = seconds_of(lambda: dequantize_4bit(packed, state), 20)
    return {"GBps": 2.5 * weight.numel() / seconds / 1e9, "ms": 1e3 * seconds}


def _attention(setup: Setup, tokens: int, results: Results) -> None:
    """Measure the forward and backward pass of one layer's attention on four packed rows."""
    heads, size, length = (4, 64, tokens // _ROWS) if setup.tiny else (32, 128, tokens // _ROWS)
    rows = world.random_rows(_ROWS, length, 1000)
    positions = world.batch(rows)["position_ids"]
    mask = torch.stack([_mask(row["lengths"]) for row in rows])[:, None].to(device())  # (rows, 1, tokens, tokens)
    layer = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=4)
    ways: list[tuple[str, Any, Tensor | None]] = [
        ("sdpa with a mask of pieces", sdpa_attention_forward, mask),
        ("sdpa, causal rows without pieces", sdpa_attention_forward, None),
        ("varlen, pieces", varlen_attention, None),
    ]
    for name, attend, rule in ways:
        shapes = [(_ROWS, n, length, size) for n in (heads, heads // 4, heads // 4)]
        inputs = [torch.randn(*shape, device=device()).bfloat16().requires_grad_() for shape in shapes]

        def step(attend: Any = attend, rule: Any = rule, inputs: list[Tensor] = inputs) -> None:
            out, _ = attend(layer, *inputs, rule, scaling=size**-0.5, position_ids=positions)
            torch.autograd.grad(out, inputs, out.detach())

        with results.adding_failures(PART, f"attention, {name}"):
            results.add(PART, f"attention, {name}", ms=1e3 * seconds_of(step, 10))


def _mask(lengths: list[int]) -> Tensor:
    """Return which token attends to which, (tokens, tokens) bool."""
    piece = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (piece[:, None] == piece[None]).tril()
