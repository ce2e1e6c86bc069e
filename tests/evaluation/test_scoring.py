"""Bits per byte: each byte of held-out text scored once, whatever the packing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ft_dagster.base import prepare_base
from ft_dagster.evaluation.evaluate import evaluate
from ft_dagster.evaluation.request import EvaluationRequest, evaluation_key
from ft_dagster.evaluation.scoring import bits_per_byte, document_nats, summarize
from ft_dagster.recipe import resolve_recipe
from ft_dagster.store import Artifact
from ft_dagster.tokens.dataset import all_documents, load_shards
from ft_dagster.tokens.shard import Document
from ft_dagster.tokens.tokenizer import DocumentTokenizer
from ft_dagster.training.packed_model import PackedModel
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train


@pytest.fixture
def texts(prose: Callable[[int, int], str]) -> dict[str, str]:
    return {f"chapter_{n}": prose(n, 3 + n) for n in range(5)} | {"chapter_short": "Ω."}


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], texts: dict[str, str]) -> Path:
    return make_dataset(texts, held_out=["chapter_3", "chapter_4", "chapter_short"])


def test_packed_and_cut_documents_score_as_they_do_whole_and_alone(
    tiny_base: Path, tiny_recipe: dict[str, Any], make_dataset: Callable[..., Path], texts: dict[str, str]
) -> None:
    dataset = Artifact.open(make_dataset(texts, held_out=["chapter_3", "chapter_short"], block_length=512))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = DocumentTokenizer(tiny_base)
    ((rows, documents),) = load_shards(dataset, "held_out")
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    packed = PackedModel(tuned, resolve_recipe(tiny_recipe | {"base": tiny_recipe["base"] | {"dtype": "float32"}}))
    nats = document_nats(packed, rows, tokenizer.eos_id, 2)
    assert {documents[index].chapter for index in nats} == {"chapter_3", "chapter_short"}
    for index, value in nats.items():
        ids = torch.tensor([tokenizer.encode([texts[documents[index].chapter]])[0].ids])
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        assert value == pytest.approx(expected, rel=1e-5)


def test_every_byte_that_can_be_predicted_is_counted_once(
    dataset: Path, tiny_base: Path, texts: dict[str, str]
) -> None:
    tokenizer = DocumentTokenizer(tiny_base)
    for document in all_documents(Artifact.open(dataset)):
        text = texts[document.chapter]
        first = tokenizer.decode(tokenizer.encode([text])[0].ids[:1])
        if "�" not in first:  # a token that is a whole character
            assert document.scored_bytes == len(text.encode()) - len(first.encode())
        assert document.bytes == len(text.encode())


def test_bits_per_byte_weigh_chapters_by_their_bytes() -> None:
    def document(chapter: str, size: int) -> Document:
        return Document(chapter, "", "", "", "held_out", 1, size, size, 0)

    bits = [(document("a", 100), 100), (document("b", 800), 800), (document("a", 100), 300)]
    summary = summarize((scored, number * math.log(2)) for scored, number in bits)
    assert summary["chapters"]["a"] == {"bits_per_byte": pytest.approx(2.0), "bytes": 200}
    assert summary["chapters"]["b"] == {"bits_per_byte": pytest.approx(1.0), "bytes": 800}
    assert summary["bits_per_byte"] == pytest.approx(1.2)
    assert bits_per_byte(1.0, 0) == 0.0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_new_and_released_adapter_are_measured_side_by_side(
    dataset: Path, tiny_recipe: dict[str, Any], tmp_path: Path, quantization: str
) -> None:
    content = tiny_recipe | {"base": tiny_recipe["base"] | {"quantization": quantization}}
    recipe = resolve_recipe(content)
    base = prepare_base(recipe.base, tmp_path / "cache")

    def adapter(name: str, epochs: int) -> str:
        longer = resolve_recipe(content | {"training": content["training"] | {"epochs": epochs}})
        request = TrainingRequest(
            key=name,
            base=base.to_json(),
            dataset=str(dataset),
            recipe=longer.model_dump(mode="json"),
            attempt=str(tmp_path / name),
            logs=str(tmp_path / "logs"),
            offload=str(tmp_path / "offload"),
            locks=str(tmp_path / "locks"),
        )
        train(request, lambda _: None)
        return str(tmp_path / name / "adapter")

    result = evaluate(
        EvaluationRequest(
            base=base.to_json(),
            dataset=str(dataset),
            recipe=recipe.model_dump(mode="json"),
            adapters={"released": adapter("short", 1), "new": adapter("long", 6)},
            output=str(tmp_path / "evaluation"),
            offload=str(tmp_path / "offload"),
            locks=str(tmp_path / "locks"),
        )
    )
    scores = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    assert scores["new"] < scores["released"] < scores["base"]
    assert all(set(m["chapters"]) == {"chapter_3", "chapter_4", "chapter_short"} for m in result["models"].values())
    assert result["models"]["base"]["samples"][0]["prompt"] == "The committee"
    assert result == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())


def test_an_evaluation_is_made_again_when_what_is_compared_changes(tiny_recipe: dict[str, Any]) -> None:
    recipe = resolve_recipe(tiny_recipe)
    key = evaluation_key("new", "dataset", None, recipe)
    assert key == evaluation_key("new", "dataset", None, recipe)
    assert key != evaluation_key("new", "dataset", "released", recipe)
    assert key != evaluation_key("other", "dataset", None, recipe)
    assert key != evaluation_key("new", "dataset", None, resolve_recipe(tiny_recipe | {"release": {"minimum_gain": 1}}))
