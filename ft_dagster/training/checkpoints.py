"""Checkpoints that are whole: one half written when the process died is never resumed from."""

import importlib
import pickle
import shutil
import signal
import threading
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.training.attempt_format import write_format
from ft_dagster.training.attempts import COMPLETE, last_checkpoint, mark_complete, step_of
from ft_dagster.training.shared_checkpoints import SharedCheckpoints

_PICKLES = (".pt", ".pth", ".bin")
_SHARES = ".metadata"
_PLAIN = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Newer ones, half written or damaged, are removed: they are made anew."""
    last = last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if last is None or step_of(path) > step_of(last) or not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)  # where several processes train, each of them does
    return last


def require_plain_state(checkpoint: Path) -> None:
    """Look into a checkpoint before anything of it is used: state of PyTorch that holds numbers and nothing else.

    Its files are zipped pickles. transformers reads them as this does, with `weights_only`, where a pickle can name
    only tensors and plain values; here the file is named, and no data is read.

    Raises:
        TrainingError: a file holds anything else, or is damaged. Nothing in it was run.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.name == _SHARES:
                with path.open("rb") as file:
                    _SharesReader(file).load()
            elif path.suffix in _PICKLES:
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a reader stumbles over in bytes that nobody vouches for
            raise TrainingError(
                f"{path} is not plain state of a training, so that nothing of {checkpoint.name} is used "
                f"({str(error).strip().splitlines()[0]}). Delete the folder {checkpoint}; training goes on from an "
                "older checkpoint, or from its beginning."
            ) from error


class _SharesReader(pickle.Unpickler):
    """Of the list of what each process of FSDP saved, which PyTorch itself reads as any pickle."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(importlib.import_module(module), name) if module.partition(".")[0] == "torch" else None
        described = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        if (module.startswith("torch.distributed.checkpoint.") and described) or (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once the trainer has written all of it, in every process; then others may have it."""

    def __init__(self, number_format: str, shared: SharedCheckpoints | None = None) -> None:
        self.number_format = number_format
        self.shared = shared

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks.wait_for_all()
        if ranks.is_first():
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (checkpoint / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # pickled objects, which nothing reads
            write_format(checkpoint, self.number_format)
            mark_complete(checkpoint)
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
