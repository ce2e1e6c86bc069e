"""What a training process tells while it runs: a file for whoever looks, and messages to the run that started it."""

import json
import logging
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.runtime.messages import WARNING
from ft_dagster.store.local import write_atomically
from ft_dagster.training.request import PROGRESS

_MUCH_SLOWER = 10.0
"""How many times as long as it was told before a training may take until that is worth a warning."""
_STEPS_TO_JUDGE = 2
"""Optimizer steps after which it is known how long a step takes."""
_LEAST_TOLD = 60.0
"""Seconds: less than a minute is told as one."""
_MESSAGES = 50
"""Messages to the run, at most: each is an event in its log."""


log = logging.getLogger(__name__)


def peak_memory() -> int:
    """Bytes: the most that tensors took on the GPU, or that the process took on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress(TrainerCallback):
    """Follows the trainer's log: loss, learning rate, tokens a second, memory."""

    def __init__(
        self,
        attempt: Path,
        tokens_seen: Callable[[], int],
        tell: Callable[[dict[str, Any]], None],
        told_seconds: float | None = None,
        run: str | None = None,
    ) -> None:
        """Follow a training.

        Args:
            attempt: its folder, for progress.json.
            tokens_seen: gives the tokens that went by.
            tell: takes what the run is to know.
            told_seconds: how long the plan said that it takes; None if it said nothing.
            run: id of the run that trains.
        """
        self.run = run
        self.told_seconds = told_seconds and max(told_seconds, _LEAST_TOLD)
        self.warning: str | None = None
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
                "or set base.dtype: float32 if it computes in float16."
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
        if (done := state.global_step - self.first_step) >= _STEPS_TO_JUDGE:
            self.compare((time.monotonic() - self.began) / done * (state.max_steps - self.first_step))
        self._write(state, row)
        every = max(1, math.ceil(state.max_steps / _MESSAGES))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.tell(row | {"steps": state.max_steps})

    def compare(self, seconds: float) -> None:
        """Say, once, that training will take much longer than was told before it began.

        Args:
            seconds: how long it will take in all, as far as is known by now.
        """
        if self.warning or not self.told_seconds or seconds <= _MUCH_SLOWER * self.told_seconds:
            return
        self.warning = (
            f"Training will take about {_duration(seconds)}, not {_duration(self.told_seconds)} as was told before it "
            "began. Other programs may be using this machine; `ft-dagster doctor` says how fast it is in which format."
        )
        log.warning("%s", self.warning)
        self.tell({WARNING: self.warning})

    def _write(self, state: TrainerState, row: dict[str, Any]) -> None:
        if not ranks.is_first():
            return
        done = state.global_step - self.first_step
        elapsed = time.monotonic() - self.began
        remaining = elapsed / done * (state.max_steps - state.global_step) if done else self.expected_seconds
        content = {
            "at": time.time(),
            "run": self.run,
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds_left": remaining,
            "warning": self.warning,
            **row,
        }
        write_atomically(self.path, json.dumps(content))


def _duration(seconds: float) -> str:
    """
    >>> _duration(90), _duration(9000)
    ('2 min', '2.5 h')
    """
    return f"{math.ceil(seconds / 60)} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
