"""Save, check and resume from complete checkpoints; one that was half written when its process died is ignored."""

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
_FSDP_METADATA = ".metadata"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def last_complete(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Incomplete ones and newer, damaged ones are removed."""
    last = last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if last is None or step_of(path) > step_of(last) or not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)  # several processes may remove it at once
    return last


def require_plain_state(checkpoint: Path) -> None:
    """Check, before a checkpoint is used, that its PyTorch state contains nothing but tensors and plain values.

    Its files are zipped pickles. transformers reads them in the same way, with `weights_only`, so that a pickle can
    name only tensors and plain values. Here the error names the file, and tensor data is not read.

    Raises:
        TrainingError: a file contains anything else, or is damaged. No code in it was run.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.name == _FSDP_METADATA:
                with path.open("rb") as file:
                    _FsdpMetadataReader(file).load()
            elif path.suffix in _PICKLES:
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # untrusted bytes can raise anything
            raise TrainingError(
                f"{path} is not plain training state, so nothing in {checkpoint.name} is used "
                f"({str(error).strip().splitlines()[0]}). Delete the folder {checkpoint}; training then resumes from "
                "an older checkpoint, or starts over."
            ) from error


class _FsdpMetadataReader(pickle.Unpickler):
    """Reads the list of what each process of FSDP saved, which PyTorch itself would unpickle without restrictions."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(importlib.import_module(module), name) if module.partition(".")[0] == "torch" else None
        described = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
        if (module.startswith("torch.distributed.checkpoint.") and described) or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part, and then shares it, if configured."""

    def __init__(self, number_format: str, shared: SharedCheckpoints | None = None) -> None:
        self.number_format = number_format
        self.shared = shared

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks.wait_for_all()
        if ranks.is_first():
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (checkpoint / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # pickled objects that nothing reads
            write_format(checkpoint, self.number_format)
            mark_complete(checkpoint)
            if self.shared:
                self.shared.put(checkpoint)


class StopOnSignal(TrainerCallback):
    """Stops training after the current step, with a checkpoint, on SIGINT or SIGTERM; a second signal kills at once.

    Several processes stop after the same step, as soon as any of them has received the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # the thread of an engine's worker, which is killed at once
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
