"""Checkpoints that are whole: one half written when the process died is never resumed from."""

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_COMPLETE = "complete"


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Half-written ones are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once the trainer has written all of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        (checkpoint / _COMPLETE).touch()


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control
