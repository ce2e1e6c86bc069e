"""What a training process tells while it runs: a file for whoever looks, and messages to the run that started it."""

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_dagster.store import write_atomically
from ft_dagster.training import ranks
from ft_dagster.training.request import PROGRESS

_MESSAGES = 50
"""Messages to the run, at most: each is an event in its log."""


class TrainingError(Exception):
    """Training cannot go on; the message says what to change."""


def peak_memory() -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress(TrainerCallback):
    """Follows the trainer's log: loss, learning rate, tokens a second, memory."""

    def __init__(self, attempt: Path, tokens_seen: Callable[[], int], tell: Callable[[dict[str, Any]], None]) -> None:
        self.path = attempt / PROGRESS
        self.tokens_seen = tokens_seen
        self.tell = tell
        self.history: list[dict[str, Any]] = []
        self.began = time.monotonic()
        self.expected_seconds: float | None = None
        """What a trial before training said, until steps say it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.monotonic()
        self.first_step = state.global_step
        self._write(state, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"The loss is {logs['loss']} at step {state.global_step}. Lower training.learning_rate in the recipe, "
                "or set base.dtype to bfloat16 if it is float16."
            )
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "gradient_norm": logs.get("grad_norm"),
            "tokens_per_second": self.tokens_seen() / (time.monotonic() - self.began),
            "peak_memory_bytes": peak_memory(),
        }
        self.history.append(row)
        self._write(state, row)
        every = max(1, math.ceil(state.max_steps / _MESSAGES))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.tell(row | {"steps": state.max_steps})

    def _write(self, state: TrainerState, row: dict[str, Any]) -> None:
        if not ranks.is_first():
            return
        done = state.global_step - self.first_step
        elapsed = time.monotonic() - self.began
        remaining = elapsed / done * (state.max_steps - state.global_step) if done else self.expected_seconds
        content = {
            "at": time.time(),
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds_left": remaining,
            **row,
        }
        write_atomically(self.path, json.dumps(content))
