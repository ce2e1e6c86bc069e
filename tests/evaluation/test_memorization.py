"""Recitation is found without decoding, exactly where decoding would recite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.dataset.dataset import load_shards
from ft_dagster.dataset.table import PlacedPiece, pack_pieces
from ft_dagster.evaluation.memorization import CONTEXT, PASSAGE, measure_on_train, sample_rows
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.store.local import Artifact

END = 2


@pytest.fixture
def model(tiny_base: Path) -> Any:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()


@pytest.fixture
def packed(model: Any, tiny_recipe: dict[str, Any]) -> PackedModel:
    return PackedModel(model, resolve_recipe(tiny_recipe | {"base": tiny_recipe["base"] | {"dtype": "float32"}}))


def rows_of(*texts: list[int]) -> Dataset:
    pieces = [
        PlacedPiece((str(index), 0), index, np.asarray(ids, dtype=np.int32), 1, "text")
        for index, ids in enumerate(texts)
    ]
    return Dataset(pack_pieces(pieces, 512))


def continued(model: Any, seed: int, count: int) -> list[int]:
    """Return a random prefix with what greedy decoding writes after it."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (1, CONTEXT), generator=draw)
    for _ in range(count):
        chosen = model(input_ids=ids, use_cache=False).logits[:, -1]
        chosen[:, END] = -torch.inf  # a text continues
        ids = torch.cat([ids, chosen.argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


@torch.no_grad()
def test_a_passage_counts_as_recited_only_if_decoding_would_write_every_token(
    model: Any, packed: PackedModel, tiny_base: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    recited = continued(model, 0, 2 * PASSAGE)
    changed = list(recited)
    changed[CONTEXT + PASSAGE + 10] -= 1
    found = measure_on_train(packed, rows_of([*recited, END], [*changed, END]), tokenizer)
    assert (found["passages"], found["recited"]) == (4, 3)
    assert found["longest"] == {"tokens": 2 * PASSAGE, "text": tokenizer.decode(recited[CONTEXT:])}
    assert found["tokens"] == len(recited) + len(changed) - 2


def test_text_too_short_for_a_passage_has_none(packed: PackedModel, tiny_base: Path) -> None:
    found = measure_on_train(
        packed, rows_of([7] * (CONTEXT + PASSAGE), [8, 9]), AutoTokenizer.from_pretrained(tiny_base)
    )
    assert (found["passages"], found["recited"]) == (0, 0)


def test_a_sample_has_the_requested_size_and_mostly_stays_when_the_text_changes(
    make_dataset: Callable[..., Path], prose: Callable[[int, int], str]
) -> None:
    def sampled(texts: dict[str, str], tokens: int) -> list[tuple[int, ...]]:
        shards = load_shards(Artifact.open(make_dataset(texts, held_out=["chapter_0"])), "train")
        return [tuple(row["input_ids"]) for row in sample_rows(shards, tokens)]

    texts = {f"chapter_{n}": prose(7 * n, 20) for n in range(12)}
    few, every = sampled(texts, 400), sampled(texts, 10**9)
    assert 400 <= sum(map(len, few)) < 400 + 64
    assert set(few) < set(every)
    later = sampled(texts | {"chapter_11": prose(5, 30)}, 400)
    assert len(set(few) & set(later)) >= len(few) / 2
