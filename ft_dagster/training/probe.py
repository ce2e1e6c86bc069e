"""The probe: a forward and backward pass before training, to estimate its duration and the memory that it needs."""

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_dagster.model.device import device
from ft_dagster.training.progress import peak_memory

Batch = Mapping[str, torch.Tensor]
COST = 0.02
"""Largest share of a training's time that the probe may add. A shorter training knows as much after its first steps."""


@dataclass(frozen=True)
class ProbeResult:
    """Time and memory of one batch, and the duration of the training if every batch is as full."""

    seconds: float
    tokens: int
    peak_memory_bytes: int
    seconds_of_training: float


def fullest(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return the longest `count` rows, which form the batch that needs the most memory."""
    lengths = ((len(row["input_ids"]), -index) for index, row in enumerate(rows))
    return [rows[-index] for _, index in heapq.nlargest(count, lengths)]


def try_batch(model: nn.Module, batch: Batch, loss: Callable[[Batch], torch.Tensor], passes: int = 1) -> float:
    """Return the seconds of one forward and backward pass. Weights, gradients and random state are left unchanged.

    Args:
        model: the model to train, which has no gradients yet.
        batch: a batch from `collate`; int64, (rows, longest).
        loss: the loss function of the training.
        passes: the number of passes, of which the last one is timed.
    """
    inputs = {name: tensor.to(device()) for name, tensor in batch.items()}
    training = model.training
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        model.train()
        for _ in range(passes):
            began = time.monotonic()
            loss(inputs).backward()
            if device().type == "cuda":
                torch.cuda.synchronize()
            taken = time.monotonic() - began
    model.zero_grad(set_to_none=True)
    model.train(training)
    return taken


class Probe(TrainerCallback):
    """Runs the probe when the trainer is ready, before its first step."""

    def __init__(
        self,
        batch: Batch,
        loss: Callable[[Batch], torch.Tensor],
        report: Callable[[ProbeResult], None],
    ) -> None:
        self.batch = batch
        self.loss = loss
        self.report = report

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        batches = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
        if model is None or batches * COST < 1:
            return
        passes = 2 if device().type == "cuda" else 1  # CUDA loads and chooses its kernels in the first pass
        seconds = try_batch(model, self.batch, self.loss, passes)
        self.report(ProbeResult(seconds, self.batch["input_ids"].numel(), peak_memory(), seconds * batches))
