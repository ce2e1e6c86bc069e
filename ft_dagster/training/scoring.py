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
from peft import PeftModel

from ft_dagster.tokens.shard import Document
from ft_dagster.training.device import device
from ft_dagster.training.packed_model import PackedModel
from ft_dagster.training.rows import IGNORED, collate

_BATCH = 4
"""Rows in one forward pass: without gradients they need less memory than training's smallest batch."""


def bits_per_byte(nats: float, size: int) -> float:
    """Nats over a text of `size` bytes, as bits per byte; 0 for an empty text.

    >>> bits_per_byte(math.log(2) * 8, 8)
    1.0
    """
    return nats / math.log(2) / size if size else 0.0


def document_nats(model: PackedModel, rows: Dataset, end_id: int, batch: int) -> dict[int, float]:
    """Negative log-likelihood, in nats, of each document's text, each token scored once.

    The end-of-sequence token has no bytes and is not scored: a base that never saw a section end would otherwise
    be beaten for free.

    Args:
        model: computes in the precision of training.
        rows: packed rows; `documents` says whose pieces they hold.
        end_id: the token left out.
        batch: rows in one forward pass.

    Returns:
        Document index -> nats.
    """
    _evaluate_as_trained(model.model)
    nats: dict[int, float] = defaultdict(float)
    for group in _batches(rows, batch):
        tensors = {name: value.to(device()) for name, value in collate(group, end_id).items()}
        tensors["labels"].masked_fill_(tensors["labels"] == end_id, IGNORED)
        for row, row_nats in zip(group, model.token_nats(tensors).double().cpu(), strict=True):
            owners = torch.repeat_interleave(torch.tensor(row["documents"]), torch.tensor(row["lengths"]))  # (T)
            for document in set(row["documents"]):
                nats[document] += row_nats[: len(owners)][owners == document].sum().item()
    return dict(nats)


def score(model: PackedModel, shards: Iterable[tuple[Dataset, list[Document]]], end_id: int) -> dict[str, Any]:
    """Bits per byte on held-out text, in all and by chapter; see `document_nats` and `summarize`.

    Args:
        model: computes in the precision of training.
        shards: rows with the documents that they count, from `load_shards`.
        end_id: the end-of-sequence token, which is not scored.
    """
    return summarize(
        (documents[index], value)
        for rows, documents in shards
        for index, value in document_nats(model, rows, end_id, _BATCH).items()
    )


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


def _evaluate_as_trained(model: PeftModel) -> None:
    """Evaluation mode, without dropout, but for the frozen k-bit layers, which have none.

    Those of bitsandbytes compute otherwise in evaluation mode on a CPU: 8-bit ones round their inputs, too, and 4-bit
    ones, where the CPU has AVX512-BF16, are packed anew with rounded scales, in place, so that training would go on
    with another base.
    """
    model.eval()
    for layer in model.modules():
        if type(layer).__module__.startswith("bitsandbytes."):
            layer.training = True


def _batches(rows: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield [rows[index] for index in range(start, min(start + size, len(rows)))]
