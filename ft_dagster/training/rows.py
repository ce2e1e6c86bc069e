"""Packed rows as tensors: what a model reads and what it is taught."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IGNORED = -100
"""The label that no loss is computed for."""


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of rows, padded to the longest.

    Positions start again at 0 with every piece, and there is no attention mask: that is how attention is kept
    within a piece (the padding is a piece of its own). Every token is supervised but the first of each piece,
    which nothing in the piece predicts; padding is not supervised, wherever the pad token is also a text's end.

    Args:
        rows: `input_ids` and the `lengths` of the pieces in them.
        pad_id: fills up shorter rows.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64, (rows, longest); `row_lengths`: (rows), tokens before padding.
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
        for length in (*row["lengths"], width - len(tokens)):
            position_ids[index, start : start + length] = torch.arange(length)
            if start < len(tokens):
                labels[index, start] = IGNORED
            start += length
    row_lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "row_lengths": row_lengths}
