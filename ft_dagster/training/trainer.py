"""transformers' trainer over packed rows: what it is fed, and what it minimizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer

from ft_dagster.training.packed_model import PackedModel
from ft_dagster.training.rows import IGNORED, collate


class CountedRows:
    """Collates rows and counts the tokens that went by."""

    def __init__(self, pad_id: int, weights: Sequence[float] | None) -> None:
        self.pad_id = pad_id
        self.weights = weights
        self.tokens = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        return collate(rows, self.pad_id, self.weights)


class PackedTrainer(Trainer):
    """transformers' trainer with our loss: a (weighted) mean over the supervised tokens of an optimizer step."""

    def __init__(self, packed: PackedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.packed = packed
        self.model_accepts_loss_kwargs = True  # so that it counts the tokens of a step, and does not average means
        self.supervised = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        self.supervised += int((inputs["labels"] != IGNORED).sum())
        return self.packed.summed_nats(inputs) / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """What the losses of a step are divided by: its tokens, or their weight where objectives weigh differently."""
        if not batch_samples or "weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each step's entry says how many tokens its loss is the mean of."""
        if "loss" in logs:
            logs["supervised_tokens"], self.supervised = self.supervised, 0
        super().log(logs, start_time)
