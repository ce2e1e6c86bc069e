"""Packed rows as tensors: what a model reads, what it is taught, and how much each token of that weighs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ft_dagster.config.recipe import Objectives
from ft_dagster.dataset.table import OBJECTIVES

IGNORED = -100
"""The label that no loss is computed for."""


def loss_weights(objectives: Objectives) -> tuple[float, ...] | None:
    """What a token of each objective weighs, as rows count objectives; None where all that are taught weigh the same.

    >>> loss_weights(Objectives(text=1.0, rewrite=0.5))
    (1.0, 0.5)
    >>> loss_weights(Objectives(text=2.0)) is None
    True
    """
    by_name = {"text": objectives.text, "rewrite": objectives.rewrite}
    weights = tuple(by_name[name] for name in OBJECTIVES)
    return weights if len({weight for weight in weights if weight}) > 1 else None


def collate(
    rows: Sequence[Mapping[str, Any]], pad_id: int, weights: Sequence[float] | None = None
) -> dict[str, torch.Tensor]:
    """One batch of rows, padded to the longest.

    Positions start again at 0 with every piece, and there is no attention mask: that is how attention is kept
    within a piece (the padding is a piece of its own). Every token is supervised but those that a piece only shows
    (its `prompts`: the first of a text, which nothing predicts, or all of a request); padding is not supervised,
    wherever the pad token is also a text's end.

    Args:
        rows: `input_ids`, and of the pieces in them the `lengths`, `prompts` and `objectives`.
        pad_id: fills up shorter rows.
        weights: from `loss_weights`.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64, (rows, longest); `row_lengths`: (rows), tokens before padding.
        With weights, `weights`: float32, (rows, longest), 0 where nothing is supervised.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)  # (B, T)
    labels = torch.full((len(rows), width), IGNORED)  # (B, T)
    position_ids = torch.empty((len(rows), width), dtype=torch.int64)  # (B, T)
    for index, row in enumerate(rows):
        tokens = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        input_ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens)] = tokens
        start = 0
        for length, prompt in zip(row["lengths"], row["prompts"], strict=True):
            position_ids[index, start : start + length] = torch.arange(length)
            labels[index, start : start + prompt] = IGNORED
            start += length
        position_ids[index, start:] = torch.arange(width - start)
    row_lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "row_lengths": row_lengths}
    if weights is not None:
        batch["weights"] = _weights(rows, labels, weights)
    return batch


def _weights(rows: Sequence[Mapping[str, Any]], labels: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    found = torch.zeros(labels.shape)  # (B, T)
    for index, row in enumerate(rows):
        start = 0
        for length, objective in zip(row["lengths"], row["objectives"], strict=True):
            found[index, start : start + length] = weights[objective]
            start += length
    return found.masked_fill(labels == IGNORED, 0.0)
