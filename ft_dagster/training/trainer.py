"""transformers' trainer over packed rows: what it is fed, and what it minimizes."""

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
    """Collates rows and counts the tokens that went by in this process."""

    def __init__(self, pad_id: int, weights: Sequence[float] | None) -> None:
        self.pad_id = pad_id
        self.weights = weights
        self.tokens = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return collate(rows or [self._nothing], self.pad_id, self.weights)

    @property
    def _nothing(self) -> dict[str, Any]:
        """A row that teaches nothing, for a process to which the last rows of an epoch leave none."""
        return {"input_ids": [self.pad_id], "lengths": [1], "prompts": [1], "objectives": [0]}


class PackedTrainer(Trainer):
    """transformers' trainer with our loss: a (weighted) mean over the supervised tokens of an optimizer step."""

    def __init__(self, packed: PackedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.packed = packed
        self.model_accepts_loss_kwargs = True  # so that it counts the tokens of a step, and does not average means
        self.supervised = 0
        self.tokens = 0
        """Tokens that went by in all processes, at the last step that was logged."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Rows in the order of a process that trains alone, whatever the number of processes.

        accelerate's own sharding repeats some rows when the rows do not divide evenly among the processes.
        """
        if ranks.count() == 1:
            return super().get_train_dataloader()
        options = self.args
        shares = Shares(len(self.train_dataset), options.per_device_train_batch_size, int(options.data_seed or 0))
        return SharesLoader(self.train_dataset, shares, self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        self.supervised += int((inputs["labels"] != IGNORED).sum())
        with forwards_to(self.packed.model, self.packed.summed_nats):
            nats = model(inputs)  # through DDP or FSDP, which else would not know of the pass
        return nats / num_items_in_batch * ranks.count()  # they take the mean of the processes' gradients

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """What the losses of a step are divided by: its tokens, or their weight where objectives weigh differently."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each step's entry says how many tokens its loss is the mean of."""
        if "loss" in logs:
            logs["supervised_tokens"], self.supervised = ranks.total(self.supervised), 0
            self.tokens = ranks.total(self.data_collator.tokens)
        super().log(logs, start_time)


@contextmanager
def forwards_to(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """The next call of the model computes a function of ours, with the hooks and wrappers of the model around it.

    Within the function the model is itself again.
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
