"""The progress of a training while it runs: a file for other programs, and messages to the run that started it."""

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
"""How many times longer than estimated a training may take before a warning is logged."""
_STEPS_TO_JUDGE = 2
"""The number of optimizer steps after which the duration of a step is known."""
_MINIMUM_SECONDS = 60.0
"""The shortest estimate: less than a minute counts as one."""
_MESSAGES = 50
"""The maximum number of messages to the run, each of which is an event in its log."""


log = logging.getLogger(__name__)


def peak_memory() -> int:
    """Return the peak memory in bytes: that of tensors on the GPU, or that of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress(TrainerCallback):
    """Reports what the trainer logs: loss, learning rate, tokens per second, memory."""

    def __init__(
        self,
        attempt: Path,
        tokens_seen: Callable[[], int],
        report: Callable[[dict[str, Any]], None],
        expected_seconds: float | None = None,
        run: str | None = None,
    ) -> None:
        """
        Args:
            attempt: the attempt's folder, for progress.json.
            tokens_seen: returns the number of tokens trained on so far.
            report: called with each message to the run.
            expected_seconds: the duration that the plan estimated; None if there is no estimate.
            run: the id of the run that trains.
        """
        self.run = run
        self.planned_seconds = expected_seconds and max(expected_seconds, _MINIMUM_SECONDS)
        self.warning: str | None = None
        self.path = attempt / PROGRESS
        self.tokens_seen = tokens_seen
        self.report = report
        self.history: list[dict[str, Any]] = []
        self.began = time.monotonic()
        self.expected_seconds: float | None = None
        """The duration that the probe estimated, which is used until steps have been timed."""

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
            self.report(row | {"steps": state.max_steps})

    def compare(self, seconds: float) -> None:
        """Warn, once, if training will take much longer than the plan estimated.

        Args:
            seconds: the latest estimate of the total duration.
        """
        if self.warning or not self.planned_seconds or seconds <= _MUCH_SLOWER * self.planned_seconds:
            return
        self.warning = (
            f"Training will take about {_duration(seconds)}, not {_duration(self.planned_seconds)} as was estimated "
            "before it began. Other programs may be using this machine; `ft-dagster doctor` shows how fast it is in "
            "each number format."
        )
        log.warning("%s", self.warning)
        self.report({WARNING: self.warning})

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
    """Format a duration in minutes or hours.

    >>> _duration(90), _duration(9000)
    ('2 min', '2.5 h')
    """
    return f"{math.ceil(seconds / 60)} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
