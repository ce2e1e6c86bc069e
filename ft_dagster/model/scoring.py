"""How well a model predicts held-out chapters, in bits per byte.

Bits per byte is the negative log-likelihood of the text in bits over its length in UTF-8 bytes: unlike a mean
loss it weighs every token alike and can be compared between tokenizers.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from ft_dagster.dataset.shard import Document
from ft_dagster.dataset.table import OBJECTIVES
from ft_dagster.model.device import device
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import IGNORED, collate

_BATCH = 4
"""Rows in one forward pass: without gradients they need less memory than training's smallest batch."""


def bits_per_byte(nats: float, size: int) -> float:
    """Nats over a text of `size` bytes, as bits per byte; 0 for an empty text.

    >>> bits_per_byte(math.log(2) * 8, 8)
    1.0
    """
    return nats / math.log(2) / size if size else 0.0


def document_nats(model: PackedModel, rows: Dataset, end_id: int, batch: int) -> dict[int, float]:
    """Negative log-likelihood, in nats, of each document's text or, given its prompt, answer; each token scored once.

    The end-of-sequence token has no bytes and is not scored, nor is the one that ends an answer, which may be
    another: a base that never saw a section end would otherwise be beaten for free.

    Args:
        model: computes in the precision of training.
        rows: packed rows; `documents` says whose pieces they hold.
        end_id: the token left out.
        batch: rows in one forward pass.

    Returns:
        Document index -> nats.
    """
    nats: dict[int, float] = defaultdict(float)
    for row, row_nats, *_ in score_rows(model, rows, end_id, batch):
        owners = torch.repeat_interleave(torch.tensor(row["documents"]), torch.tensor(row["lengths"]))  # (T)
        for document in set(row["documents"]):
            nats[document] += row_nats[owners == document].sum().item()
    return dict(nats)


def score_rows(
    model: PackedModel, rows: Dataset, end_id: int, batch: int = _BATCH
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each row with, by token (T): nats (float64), whether it was the most probable one, whether it is scored."""
    _evaluate_as_trained(model.model)
    for group in _batches(rows, batch):
        tensors = {name: value.to(device()) for name, value in collate(group, end_id).items()}
        _leave_ends_out(tensors["labels"], group, end_id)
        nats, hits = (values.cpu() for values in model.nats_and_hits(tensors))
        scored = (tensors["labels"] != IGNORED).cpu()
        for row, *values in zip(group, nats.double(), hits, scored, strict=True):
            row_nats, row_hits, row_scored = (value[: len(row["input_ids"])] for value in values)
            yield row, row_nats, row_hits, row_scored


def _leave_ends_out(labels: torch.Tensor, rows: Sequence[Mapping[str, Any]], end_id: int) -> None:
    """Label the ends of texts and of answers as not supervised."""
    labels.masked_fill_(labels == end_id, IGNORED)
    for index, row in enumerate(rows):
        ends = accumulate(row["lengths"])
        answers = [end - 1 for end, kind in zip(ends, row["objectives"], strict=True) if OBJECTIVES[kind] == "rewrite"]
        labels[index, answers] = IGNORED


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
    """Bits per byte of the whole and of each chapter, from documents with their nats.

    Returns:
        `bits_per_byte`, `bytes` and `chapters`: of sections as prose, or of answers where only those are taught; and
        their `sections`: chapter -> section -> nats and bytes.
        Where answers are taught, also `rewrite_bits_per_byte` and `rewrite_bytes`: theirs, given their prompts.
    """
    scored = list(nats)
    answers = [row for row in scored if row[0].objective == "rewrite"]
    texts = [row for row in scored if row[0].objective == "text"] or answers
    chapters: dict[str, list[tuple[Document, float]]] = defaultdict(list)
    for document, value in texts:
        chapters[document.chapter].append((document, value))
    summary = {
        **_measured(texts),
        "chapters": {name: _measured(rows) for name, rows in sorted(chapters.items())},
        "sections": {
            name: {document.section: [value, document.scored_bytes] for document, value in rows}
            for name, rows in sorted(chapters.items())
        },
    }
    return summary | ({f"rewrite_{name}": value for name, value in _measured(answers).items()} if answers else {})


def _measured(rows: Iterable[tuple[Document, float]]) -> dict[str, float]:
    nats, sizes = zip(*((value, document.scored_bytes) for document, value in rows), strict=True)
    return {"bits_per_byte": bits_per_byte(sum(nats), sum(sizes)), "bytes": sum(sizes)}


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
