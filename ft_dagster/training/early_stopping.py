"""Early stopping: measure held-out text during training, keep the best weights, and stop when it stops improving."""

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
    """Keeps the weights that predict held-out text best, and stops after `patience` measurements without improvement.

    Every checkpoint contains the measurements and the best weights, so that a resumed training has the same result as
    one without interruption.
    """

    def __init__(
        self,
        every: int,
        patience: int | None,
        measure: Callable[[], float],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """
        Args:
            every: the number of optimizer steps between measurements. There is also one after the last step.
            patience: the number of consecutive measurements without improvement after which training stops; None to
                train to the last step.
            measure: returns held-out bits per byte of the current model. It must draw no random numbers and change no
                weights.
            report: called with each measurement.
        """
        self.every = every
        self.patience = patience
        self.measure = measure
        self.report = report
        self.measured: list[dict[str, Any]] = []
        """The `step` and `bits_per_byte` of every measurement."""
        self.weights: dict[str, torch.Tensor] = {}
        """The adapter's weights at the best measurement."""
        self.seconds = 0.0
        """Time spent on measurements since the process started."""

    @property
    def best(self) -> dict[str, Any]:
        """The best measurement; the first one of equals."""
        return min(self.measured, key=lambda row: row["bits_per_byte"])

    @property
    def over(self) -> bool:
        """Whether training should stop, after `patience` measurements without improvement."""
        if self.patience is None or not self.measured:
            return False
        return len(self.measured) - 1 - self.measured.index(self.best) >= self.patience

    def restore(self, checkpoint: Path) -> None:
        """Restore the measurements and the best weights from a checkpoint."""
        self.measured = json.loads((checkpoint / _MEASURED).read_bytes())
        self.weights = load_file(checkpoint / _BEST) if self.measured else {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"], state.global_step)
            control.should_training_stop = control.should_training_stop or self.over
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not ranks.is_first():
            return
        if self.measured:
            save_file(self.weights, checkpoint / _BEST)
        write_atomically(checkpoint / _MEASURED, json.dumps(self.measured))

    def _measure(self, model: PeftModel, step: int) -> None:
        began = time.monotonic()
        # All processes use the first one's value, so that they stop at the same step.
        row = {"step": step, "bits_per_byte": ranks.first_says(self.measure())}
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
        self.report({"step": step, "held_out_bits_per_byte": row["bits_per_byte"]})
