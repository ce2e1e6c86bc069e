"""Measure how well a model predicts text that it was trained on, and whether it recites the text word for word.

A passage counts as recited if greedy decoding, given the text before it in its piece (at least 50 tokens), would write
its 50 tokens exactly: "discoverable memorization" (Carlini et al., arXiv 2202.07646). This can be found out without
decoding: the model would write the passage if each of its tokens is the most probable one given the true text before
it. One forward pass over packed rows therefore decides it for every passage in them.
"""

import math
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ft_dagster.dataset.shard import Document
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.scoring import score_rows

CONTEXT = 50
"""Smallest number of tokens before a passage."""
PASSAGE = 50
"""Number of tokens in a passage."""


def sample_rows(shards: Iterable[tuple[Dataset, list[Document]]], tokens: int) -> Dataset:
    """Return rows chosen by a hash of their content, so that most of them stay the same after a small change.

    Args:
        shards: shards from `load_shards`.
        tokens: number of tokens, which the rows exceed by less than a row; all rows if they have fewer.
    """
    rows = concatenate_datasets([rows for rows, _ in shards])
    every = rows["input_ids"]
    chosen: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: sha256(repr(every[index]).encode()).digest()):
        if tokens <= 0:
            break
        chosen.append(index)
        tokens -= len(every[index])
    return rows.select(sorted(chosen))


def measure_on_train(model: PackedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Measure how well a model predicts rows that an adapter was trained on, and what it recites from them.

    Returns:
        `nats_per_token`; `tokens`; `passages`, and how many of them are `recited`; `longest`: the longest run of tokens
        that the model would write exactly, with its `tokens` and `text`.
    """
    nats, count, passages, recited = 0.0, 0, 0, 0
    longest: tuple[int, list[int]] = (0, [])
    for row, row_nats, hits, scored in score_rows(model, rows, tokenizer.eos_token_id):
        nats += row_nats.sum().item()
        count += int(scored.sum())
        start = 0
        for length, prompt in zip(row["lengths"], row["prompts"], strict=True):
            first = start + max(prompt, CONTEXT)
            inside = hits[first : start + length - 1]  # without the token that may end the text
            whole = len(inside) // PASSAGE
            passages += whole
            recited += int(inside[: whole * PASSAGE].view(-1, PASSAGE).all(1).sum()) if whole else 0
            at, run = _longest_run(inside)
            if run > longest[0]:
                longest = run, row["input_ids"][first + at : first + at + run]
            start += length
    return {
        "nats_per_token": nats / count if count else math.nan,
        "tokens": count,
        "passages": passages,
        "recited": recited,
        "longest": {"tokens": longest[0], "text": tokenizer.decode(longest[1])},
    }


def _longest_run(hits: torch.Tensor) -> tuple[int, int]:
    """Return where the longest run of True starts, and its length.

    >>> _longest_run(torch.tensor([True, False, True, True]))
    (2, 2)
    """
    edges = np.flatnonzero(np.diff(hits.numpy().astype(np.int8), prepend=0, append=0))  # start, end, start, end, ...
    if not len(edges):
        return 0, 0
    runs = edges[1::2] - edges[::2]
    best = int(runs.argmax())
    return int(edges[2 * best]), int(runs[best])
