"""What a model makes of text it was trained on: how well it predicts it, and whether it recites it word for word.

A passage counts as recited if greedy decoding, given the text before it in its piece (at least 50 tokens), would write
its 50 tokens exactly: "discoverable memorization" (Carlini et al., arXiv 2202.07646). No decoding is needed to know:
it would write them if each of them is the most probable one given the true text before it. So one forward pass over
packed rows says it of every passage in them.
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
"""Tokens that stand before a passage, at least."""
PASSAGE = 50
"""Tokens of a passage."""


def sample_rows(shards: Iterable[tuple[Dataset, list[Document]]], tokens: int) -> Dataset:
    """Rows with about as many tokens, chosen by a hash of their content: mostly the same ones after a small change.

    Args:
        shards: from `load_shards`.
        tokens: how many; a row more at most, all if there are fewer.
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
    """How a model predicts rows that an adapter was trained on, and what it recites of them.

    Returns:
        `nats_per_token`; `tokens`; `passages`, and how many of them are `recited`; `longest`: the longest run of tokens
        that it would write as they are, with its `tokens` and `text`.
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
    """Where the longest run of True begins, and its length.

    >>> _longest_run(torch.tensor([True, False, True, True]))
    (2, 2)
    """
    edges = np.flatnonzero(np.diff(hits.numpy().astype(np.int8), prepend=0, append=0))  # begin, end, begin, end ...
    if not len(edges):
        return 0, 0
    runs = edges[1::2] - edges[::2]
    best = int(runs.argmax())
    return int(edges[2 * best]), int(runs[best])
