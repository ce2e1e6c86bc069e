"""Checkpoints that are whole: one half written when the process died is never resumed from."""

import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_dagster.training import ranks
from ft_dagster.training.attempts import COMPLETE, last_checkpoint
from ft_dagster.training.shared_checkpoints import SharedCheckpoints


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Half-written ones are removed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return last_checkpoint(folder)


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once the trainer has written all of it, in every process; then others may have it."""

    def __init__(self, shared: SharedCheckpoints | None = None) -> None:
        self.shared = shared

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks.wait_for_all()
        if ranks.is_first():
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (checkpoint / COMPLETE).touch()
            if self.shared:
                self.shared.put(checkpoint)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end training after the current step, with a checkpoint; a second one ends it at once.

    Several processes end after the same step: the one that the signal has reached last decides nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # of an engine's worker, which is ended at once
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
        if ranks.total(self.received is not None):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control
