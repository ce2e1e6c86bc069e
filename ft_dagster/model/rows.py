"""Packed rows as tensors: the tokens that a model reads, their labels, and their weights in the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ft_dagster.config.recipe import Objectives
from ft_dagster.dataset.table import OBJECTIVES

IGNORED = -100
"""The label of tokens for which no loss is computed."""


def loss_weights(objectives: Objectives) -> tuple[float, ...] | None:
    """Return the weight of a token of each objective, in the order of OBJECTIVES; None if all trained ones are equal.

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
    """Return one batch of rows, padded to the longest.

    Positions restart at 0 with every piece, and there is no attention mask: this keeps attention within a piece (the
    padding is a piece of its own). Every token is supervised, except the prompt of a piece (the first token of a text,
    which nothing predicts, or the whole request before an answer) and the padding, even if the pad token is also the
    end-of-sequence token.

    Args:
        rows: rows with `input_ids`, and the `lengths`, `prompts` and `objectives` of their pieces.
        pad_id: the token that shorter rows are padded with.
        weights: the weight of each objective, from `loss_weights`.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64, (rows, longest); `row_lengths`: (rows), tokens before padding.
        With weights, also `weights`: float32, (rows, longest), 0 where nothing is supervised.
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
