"""Measure how well a model predicts held-out chapters, in bits per byte.

Bits per byte is the negative log-likelihood of a text, in bits, divided by its length in UTF-8 bytes. Unlike a mean
of batch losses it weighs every token equally, and it can be compared between tokenizers.
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
"""Rows in one forward pass. Without gradients they need less memory than the smallest batch of a training."""


def bits_per_byte(nats: float, size: int) -> float:
    """Convert the nats of a text of `size` bytes to bits per byte; 0 for an empty text.

    >>> bits_per_byte(math.log(2) * 8, 8)
    1.0
    """
    return nats / math.log(2) / size if size else 0.0


def document_nats(model: PackedModel, rows: Dataset, end_id: int, batch: int) -> dict[int, float]:
    """Return the negative log-likelihood, in nats, of each document's text, or of its answer given its prompt.

    Each token is scored once, except the end-of-sequence token and the token that ends an answer, which may be a
    different one: they have no bytes, and an adapter would easily beat a base that never saw a section end.

    Args:
        model: the model, which computes in the precision of training.
        rows: packed rows, whose `documents` say to which document each piece belongs.
        end_id: the end-of-sequence token, which is not scored.
        batch: the number of rows in one forward pass.

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
    """Yield each row with three values per token (T): nats (float64), whether it was the most probable, and scored."""
    _evaluate_as_trained(model.model)
    for group in _batches(rows, batch):
        tensors = {name: value.to(device()) for name, value in collate(group, end_id).items()}
        _ignore_ends(tensors["labels"], group, end_id)
        nats, hits = (values.cpu() for values in model.nats_and_hits(tensors))
        scored = (tensors["labels"] != IGNORED).cpu()
        for row, *values in zip(group, nats.double(), hits, scored, strict=True):
            row_nats, row_hits, row_scored = (value[: len(row["input_ids"])] for value in values)
            yield row, row_nats, row_hits, row_scored


def _ignore_ends(labels: torch.Tensor, rows: Sequence[Mapping[str, Any]], end_id: int) -> None:
    """Label the tokens that end texts and answers as IGNORED, so that they are not scored."""
    labels.masked_fill_(labels == end_id, IGNORED)
    for index, row in enumerate(rows):
        ends = accumulate(row["lengths"])
        answers = [end - 1 for end, kind in zip(ends, row["objectives"], strict=True) if OBJECTIVES[kind] == "rewrite"]
        labels[index, answers] = IGNORED


def score(model: PackedModel, shards: Iterable[tuple[Dataset, list[Document]]], end_id: int) -> dict[str, Any]:
    """Return bits per byte on held-out text, in total and by chapter; see `document_nats` and `summarize`.

    Args:
        model: the model, which computes in the precision of training.
        shards: rows with the documents that their `documents` index, from `load_shards`.
        end_id: the end-of-sequence token, which is not scored.
    """
    return summarize(
        (documents[index], value)
        for rows, documents in shards
        for index, value in document_nats(model, rows, end_id, _BATCH).items()
    )


def summarize(nats: Iterable[tuple[Document, float]]) -> dict[str, Any]:
    """Return bits per byte in total and of each chapter, from documents with their nats.

    Returns:
        `bits_per_byte`, `bytes` and `chapters`: those of sections as prose, or of answers if only answers are trained;
        and `sections`: chapter -> section -> nats and bytes.
        If answers are trained, also `rewrite_bits_per_byte` and `rewrite_bytes`: those of answers given their prompts.
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
    """Set evaluation mode, without dropout, except for the frozen k-bit layers, which have no dropout.

    Those of bitsandbytes compute differently in evaluation mode on a CPU. 8-bit layers then also round their inputs.
    4-bit layers, on a CPU with AVX512-BF16, are repacked in place with rounded scales, so that training would continue
    with a different base.
    """
    model.eval()
    for layer in model.modules():
        if type(layer).__module__.startswith("bitsandbytes."):
            layer.training = True


def _batches(rows: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield [rows[index] for index in range(start, min(start + size, len(rows)))]
