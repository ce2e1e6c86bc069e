"""How well a model predicts held-out chapters, in bits per byte.

Bits per byte is the negative log-likelihood of the text in bits over its length in UTF-8 bytes: unlike a mean
loss it weighs every token alike and can be compared between tokenizers.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PreTrainedModel

from ft_dagster.tokens.shard import Document
from ft_dagster.training.device import device
from ft_dagster.training.rows import IGNORED, collate


def bits_per_byte(nats: float, size: int) -> float:
    """Nats over a text of `size` bytes, as bits per byte; 0 for an empty text.

    >>> bits_per_byte(math.log(2) * 8, 8)
    1.0
    """
    return nats / math.log(2) / size if size else 0.0


@torch.no_grad()
def document_nats(model: PreTrainedModel, rows: Dataset, end_id: int, batch: int, dtype: str) -> dict[int, float]:
    """Negative log-likelihood, in nats, of each document's text, each token scored once.

    The end-of-sequence token has no bytes and is not scored: a base that never saw a section end would otherwise
    be beaten for free.

    Args:
        model: a causal language model.
        rows: packed rows; `documents` says whose pieces they hold.
        end_id: the token left out.
        batch: rows in one forward pass.
        dtype: what matrix products are computed in, as in training.

    Returns:
        Document index -> nats.
    """
    model.eval()
    nats: dict[int, float] = defaultdict(float)
    precision = getattr(torch, dtype)
    for group in _batches(rows, batch):
        tensors = {name: value.to(device()) for name, value in collate(group, end_id).items()}
        targets = tensors.pop("labels")[:, 1:]  # (B, T - 1)
        targets = targets.masked_fill(targets == end_id, IGNORED)
        with torch.autocast(device().type, dtype=precision, enabled=precision != torch.float32):
            logits = model(**tensors, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        for row, row_logits, row_targets in zip(group, logits, targets, strict=True):
            losses = functional.cross_entropy(
                row_logits.float(), row_targets, ignore_index=IGNORED, reduction="none"
            )  # (T - 1)
            start = 0
            for document, length in zip(row["documents"], row["lengths"], strict=True):
                nats[document] += losses[start : start + length - 1].sum(dtype=torch.float64).item()
                start += length
    return dict(nats)


def summarize(nats: Iterable[tuple[Document, float]]) -> dict[str, Any]:
    """Bits per byte of the whole and of each chapter, from documents with their nats."""
    chapters: dict[str, list[float]] = {}
    for document, value in nats:
        total = chapters.setdefault(document.chapter, [0.0, 0.0])
        total[0] += value
        total[1] += document.scored_bytes
    whole = [sum(column) for column in zip(*chapters.values(), strict=True)]
    return {
        "bits_per_byte": bits_per_byte(whole[0], int(whole[1])),
        "bytes": int(whole[1]),
        "chapters": {
            name: {"bits_per_byte": bits_per_byte(total, int(size)), "bytes": int(size)}
            for name, (total, size) in sorted(chapters.items())
        },
    }


def _batches(rows: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield [rows[index] for index in range(start, min(start + size, len(rows)))]
