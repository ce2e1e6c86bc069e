"""Held-out text while training: measured every so often, the best weights kept, an end when it gets no better."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.store.local import write_atomically

_MEASURED = "held_out.json"
_BEST = "best.safetensors"


class EarlyStopping(TrainerCallback):
    """Keeps the weights that predict held-out text best, and ends training after `patience` measurements without gain.

    What was measured, and the best weights, are part of every checkpoint, so that a training that goes on from one
    ends as it would have.
    """

    def __init__(
        self,
        every: int,
        patience: int | None,
        measure: Callable[[], float],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        """
        Args:
            every: optimizer steps between measurements; there is one after the last step, too.
            patience: measurements in a row that may be no better than the best one before training ends; None: it
                goes on to its last step.
            measure: held-out bits per byte of the model as it is now. Must draw no random number and change no weight.
            tell: takes each measurement.
        """
        self.every = every
        self.patience = patience
        self.measure = measure
        self.tell = tell
        self.measured: list[dict[str, Any]] = []
        """`step` and `bits_per_byte` of every measurement."""
        self.weights: dict[str, torch.Tensor] = {}
        """The adapter's at the best of them."""
        self.seconds = 0.0
        """Spent on measurements since the process began."""

    @property
    def best(self) -> dict[str, Any]:
        """The best measurement; of equal ones the first."""
        return min(self.measured, key=lambda row: row["bits_per_byte"])

    @property
    def over(self) -> bool:
        """Whether measurements have been no better for long enough."""
        if self.patience is None or not self.measured:
            return False
        return len(self.measured) - 1 - self.measured.index(self.best) >= self.patience

    def restore(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint holds."""
        self.measured = json.loads((checkpoint / _MEASURED).read_bytes())
        self.weights = load_file(checkpoint / _BEST) if self.measured else {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(kwargs["model"], state.global_step)
            control.should_training_stop = control.should_training_stop or self.over
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not ranks.is_first():
            return
        if self.measured:
            save_file(self.weights, checkpoint / _BEST)
        write_atomically(checkpoint / _MEASURED, json.dumps(self.measured))

    def _look(self, model: PeftModel, step: int) -> None:
        began = time.monotonic()
        row = {"step": step, "bits_per_byte": ranks.first_says(self.measure())}  # so that all stop at the same step
        model.train()
        self.seconds += time.monotonic() - began
        if not math.isfinite(row["bits_per_byte"]):
            raise TrainingError(
                f"Held-out text has {row['bits_per_byte']} bits per byte at step {step}. Lower training.learning_rate "
                "in the recipe."
            )
        self.measured.append(row)
        if self.best is row:
            trained = get_peft_model_state_dict(model)
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
        self.tell({"step": step, "held_out_bits_per_byte": row["bits_per_byte"]})
