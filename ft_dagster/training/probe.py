"""One forward and backward pass before training, to know how long it will take and what memory it needs."""

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
"""The most that the trial may add to a training. Shorter ones know as much after their first steps."""


@dataclass(frozen=True)
class Trial:
    """What one batch took, and what the training will take if every batch is as full."""

    seconds: float
    tokens: int
    peak_memory_bytes: int
    seconds_of_training: float


def fullest(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The longest rows: the batch that needs the most memory."""
    lengths = ((len(row["input_ids"]), -index) for index, row in enumerate(rows))
    return [rows[-index] for _, index in heapq.nlargest(count, lengths)]


def try_batch(model: nn.Module, batch: Batch, loss: Callable[[Batch], torch.Tensor], passes: int = 1) -> float:
    """Seconds of one forward and backward pass. Weights, gradients and random numbers are as before afterwards.

    Args:
        model: in training, without gradients.
        batch: as `collate` makes it; int64, (rows, longest).
        loss: the one that training takes, of a batch.
        passes: how many are made; the last one counts.
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
    """Tries a batch when the trainer is ready and has not begun."""

    def __init__(
        self,
        batch: Batch,
        loss: Callable[[Batch], torch.Tensor],
        tell: Callable[[Trial], None],
    ) -> None:
        self.batch = batch
        self.loss = loss
        self.tell = tell

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
        passes = 2 if device().type == "cuda" else 1  # in the first one CUDA loads and chooses its kernels
        seconds = try_batch(model, self.batch, self.loss, passes)
        self.tell(Trial(seconds, self.batch["input_ids"].numel(), peak_memory(), seconds * batches))
