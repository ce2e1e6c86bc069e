"""The request to a contender, and the measurements that it makes while it trains.

A contender is a process: `python SCRIPT REQUEST.json`. It reads a request, trains, saves, and writes its result next
to the adapter. All contenders import this file, so it uses nothing but torch that one of them might lack.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULT = "result.json"
FIRST_STEPS = 3
"""The number of optimizer steps after which the duration of a training is estimated."""


@dataclass(frozen=True)
class Request:
    """A request for one training."""

    base: str
    """Folder of the base model."""
    chapters: list[str]
    """The Markdown files to train on."""
    output: str
    """Folder for the adapter and the result."""
    epochs: int
    threads: int
    recipe: dict[str, Any]
    """Values of ft_dagster's recipe, which contenders use where they can."""
    number_format: str = "bfloat16"
    """The number format to compute in: bfloat16 or float32, whichever is faster on this processor."""
    patience_seconds: float = 1200.0
    """If the first steps show that training would take longer than this, it stops after them; they give the rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of this contender only."""

    @classmethod
    def read(cls) -> "Request":
        return cls(**json.loads(Path(sys.argv[1]).read_bytes()))

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), "utf-8")
        return path

    def texts(self) -> list[str]:
        """Return one example per chapter."""
        return [Path(chapter).read_text("utf-8-sig", errors="replace") for chapter in self.chapters]


class TooLongError(Exception):
    """Training would take longer than the request allows."""


class Stopwatch:
    """Measures the time from the start of the first training step to the end of the last, and counts their tokens.

    The first step starts with the first forward pass with gradients; a step ends when an optimizer has changed the
    weights. Tokens are counted only once a step has used their gradient.
    """

    def __init__(self, end_id: int, patience_seconds: float) -> None:
        """Hook into every model and optimizer of this process.

        Args:
            end_id: the end-of-sequence token, which is not text.
            patience_seconds: if training would take longer than this, TooLongError is raised after its first steps.
        """
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.end_id, self.patience_seconds = end_id, patience_seconds
        self.expected_steps: int | None = None
        self.ended_early = False
        self.steps = self.text_tokens = self.end_tokens = 0
        self.pieces: Counter[int] = Counter()
        self._waiting: list[tuple[int, int, Counter[int]]] = []
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)

        def first_forward(module: Any, _: Any) -> None:
            if module.training and torch.is_grad_enabled():
                hook.remove()  # it would cost time at every layer
                self._began = (time.perf_counter(), time.process_time())

        hook = register_module_forward_pre_hook(first_forward)
        register_optimizer_step_post_hook(lambda *_: self._step())

    def saw(self, input_ids: Any, labels: Any, position_ids: Any = None, attention_mask: Any = None) -> None:
        """Count a batch on its way to the loss.

        Args:
            input_ids: (B, T).
            labels: (B, T), not shifted; -100 where a token is not supervised.
            position_ids: (B, T), if pieces are packed; each piece starts at 0.
            attention_mask: (B, T), if rows are padded.
        """
        targets = labels[:, 1:]
        supervised = int((targets != -100).sum())
        ends = int((targets == self.end_id).sum())
        pieces: Counter[int] = Counter()
        for row in range(len(input_ids)):
            width = input_ids.shape[1] if attention_mask is None else int(attention_mask[row].sum())
            starts = [0] if position_ids is None else (position_ids[row, :width] == 0).nonzero()[:, 0].tolist()
            pieces.update(end - start for start, end in zip(starts, [*starts[1:], width], strict=True))
        self._waiting.append((supervised - ends, ends, pieces))

    def _step(self) -> None:
        self._ended = (time.perf_counter(), time.process_time())
        self.steps += 1
        for text, ends, pieces in self._waiting:
            self.text_tokens += text
            self.end_tokens += ends
            self.pieces += pieces
        self._waiting.clear()
        assert self._began is not None
        seconds = (self._ended[0] - self._began[0]) * (self.expected_steps or 0) / self.steps
        if self.steps == FIRST_STEPS and seconds > self.patience_seconds:
            self.ended_early = True
            raise TooLongError

    def write(self, folder: str, **more: Any) -> None:
        """Write the result; `more` adds values, or replaces those that were counted."""
        assert self._began is not None, "no training step ran"
        result = {
            "seconds": self._ended[0] - self._began[0],
            "cpu_seconds": self._ended[1] - self._began[1],
            "steps": self.steps,
            "text_tokens": self.text_tokens,
            "end_tokens": self.end_tokens,
            "pieces": dict(self.pieces),
            "ended_early": self.ended_early,
            **more,
        }
        Path(folder, RESULT).write_text(json.dumps(result, indent=1), "utf-8")


def count_in_trainer(stopwatch: Stopwatch) -> None:
    """Count the batches of every transformers Trainer in this process, including its subclasses."""
    from transformers import Trainer

    step = Trainer.training_step

    def counted(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        stopwatch.expected_steps = self.state.max_steps
        stopwatch.saw(**{name: inputs[name] for name in names if inputs.get(name) is not None})
        return step(self, model, inputs, *more, **options)

    Trainer.training_step = counted
