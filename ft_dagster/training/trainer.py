"""transformers' Trainer for packed rows: its batches and its loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ft_dagster.model import ranks
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import IGNORED, collate
from ft_dagster.training.shares import Shares, SharesLoader


class CountedRows:
    """Collates rows, and counts the tokens that this process has read."""

    def __init__(self, pad_id: int, weights: Sequence[float] | None) -> None:
        self.pad_id = pad_id
        self.weights = weights
        self.tokens = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return collate(rows or [self._nothing], self.pad_id, self.weights)

    @property
    def _nothing(self) -> dict[str, Any]:
        """A row without supervised tokens, for a process that gets no rows in the last pass of an epoch."""
        return {"input_ids": [self.pad_id], "lengths": [1], "prompts": [1], "objectives": [0]}


class PackedTrainer(Trainer):
    """transformers' Trainer with our loss: the (weighted) mean over the supervised tokens of an optimizer step."""

    def __init__(self, packed: PackedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.packed = packed
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of a step instead of averaging means
        self.supervised = 0
        self.tokens = 0
        """The number of tokens that all processes had read at the last logged step."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of rows in the order of a single process, whatever the number of processes.

        accelerate's own sharding repeats some rows when the rows do not divide evenly among the processes.
        """
        if ranks.count() == 1:
            return super().get_train_dataloader()
        options = self.args
        shares = Shares(len(self.train_dataset), options.per_device_train_batch_size, int(options.data_seed or 0))
        return SharesLoader(self.train_dataset, shares, self.data_collator)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of the learning rate, without a warm-up that would take all of the steps.

        With such a warm-up the learning rate would never reach its value, and in a training of one step it would be 0.
        """
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        self.supervised += int((inputs["labels"] != IGNORED).sum())
        with forwards_to(self.packed.model, self.packed.summed_nats):
            nats = model(inputs)  # through DDP or FSDP, which must see the forward pass
        return nats / num_items_in_batch * ranks.count()  # DDP and FSDP average the processes' gradients

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """Return the divisor of a step's losses: its number of tokens, or their weight if objectives have weights."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as usual, and add to each step's entry the number of tokens that its loss is the mean of."""
        if "loss" in logs:
            logs["supervised_tokens"], self.supervised = ranks.total(self.supervised), 0
            self.tokens = ranks.total(self.data_collator.tokens)
        super().log(logs, start_time)


@contextmanager
def forwards_to(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the model's next forward pass with `function`, called within the model's hooks and wrappers.

    Within the function, the model's own forward pass is restored.
    """
    own = vars(model).pop("forward", None)

    def once(*arguments: Any) -> Any:
        restore()
        return function(*arguments)

    def restore() -> None:
        vars(model).pop("forward", None)
        if own is not None:
            vars(model)["forward"] = own

    vars(model)["forward"] = once
    try:
        yield
    finally:
        restore()
