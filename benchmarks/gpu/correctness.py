"""Check that this device computes the same as float32 on a CPU, separates pieces, and resumes to the same bytes."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu import variants, world
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup
from ft_dagster.base.prepare import prepare_base
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.training.request import WEIGHTS
from ft_dagster.training.train import InterruptedTrainingError, train

_LENGTH = 256
"""The number of tokens in a row."""
_REFERENCE = "reference.pt"


@dataclass(frozen=True)
class Way:
    """A way to compute a small model."""

    quantization: str
    dtype: str
    attention: str = "sdpa"
    checkpointing: bool = False
    fused: bool = False
    half: bool = False
    liger: bool = False

    @property
    def name(self) -> str:
        options = [name for name in ("checkpointing", "fused", "half", "liger") if getattr(self, name)]
        return " ".join([self.quantization, self.dtype, self.attention, *options])


WAYS = [
    *(Way(q, d, attention=a) for q in ("none", "nf4") for d in ("float32", "bfloat16") for a in ("sdpa", "eager")),
    Way("nf4", "bfloat16", checkpointing=True),
    Way("none", "bfloat16", fused=True),
    Way("none", "bfloat16", variants.VARLEN),
    Way("nf4", "bfloat16", variants.VARLEN),
    Way("nf4", "bfloat16", half=True),
    Way("nf4", "bfloat16", variants.VARLEN, half=True, liger=True),
    Way("none", "bfloat16", variants.VARLEN, liger=True),
]


def compute_reference(setup: Setup, results: Results) -> None:
    """Compute loss and gradient in float32 on a CPU, with and without NF4, and the effect of mixing pieces."""
    base, rows = _small(setup)
    models = {quantization: _tuned(setup, base, Way(quantization, "float32")) for quantization in ("none", "nf4")}
    found: dict[str, Any] = {name: _loss_and_gradient(model, rows) for name, model in models.items()}
    found["mixed"] = _apart(models["none"], rows, [world.as_one_piece(row) for row in rows])
    torch.save(found, setup.folder / _REFERENCE)
    nats = {name: found[name][0] for name in models}
    results.add("reference", "nats of a token", **nats, change_if_pieces_mixed=found["mixed"])


def compare(setup: Setup, results: Results) -> None:
    """Compare loss and gradient with the reference, and each piece of a packed row with the same piece alone.

    The tolerances in float32 are 1e-4 of the loss, 1e-3 of the gradient's norm, and 1e-3 nats per token. In bfloat16,
    which has three digits, they are 1e-2, 0.1, and an eighth of the effect of mixing pieces.
    """
    base, rows = _small(setup)
    reference = torch.load(setup.folder / _REFERENCE)
    for way in filter(lambda way: setup.wants(way.name), WAYS):
        with results.adding_failures("correct", way.name):
            model = _tuned(setup, base, way)
            if way.fused and model.not_fused:
                results.add("correct", way.name, not_run=f"Its layers are not fused: {model.not_fused}")
                continue
            nats, gradient = _loss_and_gradient(model, rows)
            expected, wanted = reference[way.quantization]
            loss, error = abs(nats - expected) / expected, ((gradient - wanted).norm() / wanted.norm()).item()
            apart = _apart(model, rows, rows)
            limits = (1e-4, 1e-3, 1e-3) if way.dtype == "float32" else (1e-2, 0.1, reference["mixed"] / 8)
            right = all(value < limit for value, limit in zip((loss, error, apart), limits, strict=True))
            results.add("correct", way.name, right=right, loss=loss, gradient=error, nats_from_alone=apart)


def compare_resumed(setup: Setup, results: Results) -> None:
    """Compare the weights of a training with those of a second one, and of one that was stopped and resumed.

    If a kernel adds in no fixed order, the second training already differs, and no resume can be exact either.
    """
    base, _ = _small(setup)
    changes = {"training.rows_per_device": 4, "training.epochs": 0.2, "training.learning_rate": 1e-3}
    recipe = world.recipe(setup, base, {"tokens.block_length": _LENGTH} | changes)
    trained_on = world.dataset(setup, base, _LENGTH)
    began, weights = time.strftime("%H%M%S"), {}

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    for name in ("whole", "again", "resumed"):
        request = world.training_request(setup, recipe, trained_on, f"{began}-{name}")
        try:
            found = train(request, interrupt if name == "resumed" else lambda _: None)
        except InterruptedTrainingError:
            found = train(request, lambda _: None)
        weights[name] = load_file(Path(request.attempt) / "adapter" / WEIGHTS)
        apart = max((tensor - weights["whole"][key]).abs().max().item() for key, tensor in weights[name].items())
        facts = {key: found[key] for key in ("steps", "resumed_from", "final_loss", "reloads")}
        results.add("resume", name, same_bytes=apart == 0, largest_difference=apart, **facts)


def _small(setup: Setup) -> tuple[Path, list[world.Row]]:
    """Return a small base, and two packed rows of real text, tokenized for it."""
    base = world.random_base(setup, world.small_config())
    return base, world.real_rows(world.dataset(setup, base, _LENGTH), 2)


def _tuned(setup: Setup, base: Path, way: Way) -> PackedModel:
    """Return a model with an adapter whose weights are not zero, and the same on every device."""
    fields = {"base.quantization": way.quantization, "base.dtype": way.dtype, "tokens.block_length": _LENGTH}
    training = {"training.gradient_checkpointing": False, "training.fused": way.fused, "lora.dropout": 0.0}
    recipe = world.recipe(setup, base, fields | training)
    prepared = prepare_base(recipe.base, setup.folder / "cache")
    model = add_adapter(load_base(prepared, recipe, None), prepared, recipe)
    chance = torch.Generator().manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            weight.data.copy_(torch.randn(weight.shape, generator=chance) * 0.02)
    packed = PackedModel(model.train(), recipe)
    if packed.not_fused is not None:
        changed = {"checkpointing": way.checkpointing, "half": way.half or None, "liger": way.liger}
        variants.apply(packed, variants.Variant(dropout=False, attention=way.attention, **changed))
    return packed


def _loss_and_gradient(model: PackedModel, rows: list[world.Row]) -> tuple[float, torch.Tensor]:
    """Return mean nats per token, and the gradient of all adapter weights as one vector in float64."""
    batch = world.batch(rows)
    nats = model.summed_nats(batch) / (batch["labels"] != -100).sum()
    nats.backward()
    gradients = {name: weight.grad for name, weight in model.model.named_parameters() if weight.grad is not None}
    return nats.item(), torch.cat([gradients[name].flatten().double().cpu() for name in sorted(gradients)])


def _apart(model: PackedModel, rows: list[world.Row], packed: list[world.Row]) -> float:
    """Return the largest difference, in nats of a token, between packed rows and their pieces computed alone."""
    together, largest = model.nats_and_hits(world.batch(packed))[0], 0.0
    for index, row in enumerate(rows):
        start = 0
        for length in row["lengths"]:
            if length > 1:
                piece = {"input_ids": row["input_ids"][start : start + length], "lengths": [length], "prompts": [1]}
                alone = model.nats_and_hits(world.batch([piece]))[0][0, 1:]  # nothing predicts a piece's first token
                largest = max(largest, (alone - together[index, start + 1 : start + length]).abs().max().item())
            start += length
    return largest
