"""Bits per byte: each byte of held-out text is scored once, whatever the packing."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.dataset.dataset import all_documents, load_shards
from ft_dagster.dataset.rewriting import INSTRUCTION
from ft_dagster.dataset.shard import Document
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.scoring import bits_per_byte, document_nats, summarize
from ft_dagster.store.local import Artifact


@pytest.fixture
def texts(prose: Callable[[int, int], str]) -> dict[str, str]:
    return {f"chapter_{n}": prose(n, 3 + n) for n in range(5)} | {"chapter_short": "Ω."}


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], texts: dict[str, str]) -> Path:
    return make_dataset(texts, held_out=["chapter_3", "chapter_4", "chapter_short"])


def test_packed_and_split_documents_score_as_they_do_whole_and_alone(
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
        if "�" not in first:  # a token for a whole character
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


def test_answers_are_scored_next_to_sections_or_alone_if_only_answers_are_taught() -> None:
    def scored(chapter: str, objective: str, bits: float) -> tuple[Document, float]:
        return Document(chapter, "", "", "", "held_out", 1, 10, 10, 0, objective), bits * math.log(2)

    text, answer = scored("a", "text", 20), scored("b", "rewrite", 5)
    both = summarize([text, answer])
    assert (both["bits_per_byte"], both["bytes"], set(both["chapters"])) == (pytest.approx(2.0), 10, {"a"})
    assert (both["rewrite_bits_per_byte"], both["rewrite_bytes"]) == (pytest.approx(0.5), 10)
    alone = summarize([answer])
    assert alone["bits_per_byte"] == alone["rewrite_bits_per_byte"] == pytest.approx(0.5)
    assert set(alone["chapters"]) == {"b"}
    assert not [name for name in summarize([text]) if name.startswith("rewrite")]


@pytest.mark.parametrize("text", [0.0, 1.0])
def test_an_answer_is_scored_given_its_prompt_without_the_token_that_ends_it(
    tiny_base: Path,
    tiny_recipe: dict[str, Any],
    make_dataset: Callable[..., Path],
    texts: dict[str, str],
    text: float,
) -> None:
    def report(name: str) -> dict[str, Any]:
        return {"sections": {n: {"original": f"{n} {name} was", "improved": f"{n} {name} is"} for n in "AB"}}

    reports = texts | {"held": report("held"), "train": report("train")}
    objectives = {"text": text, "rewrite": 1.0}
    path = make_dataset(reports, held_out=["chapter_3", "held"], block_length=512, **objectives)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ((rows, documents),) = load_shards(Artifact.open(path), "held_out")
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    packed = PackedModel(tuned, resolve_recipe(tiny_recipe | {"base": tiny_recipe["base"] | {"dtype": "float32"}}))
    nats = document_nats(packed, rows, tokenizer.eos_token_id, 2)
    assert Counter(documents[index].objective for index in nats) == Counter(text=3 if text else 0, rewrite=2)
    another_end = document_nats(packed, rows, 0, 2)  # as with answers that end with a token of their own
    assert {i: another_end[i] for i in nats if documents[i].objective == "rewrite"} == pytest.approx(
        {i: value for i, value in nats.items() if documents[i].objective == "rewrite"}
    )
    for index, value in nats.items():
        document = documents[index]
        if document.objective == "rewrite":
            request = f"{INSTRUCTION}\n\n## {document.title}\n\n{document.title} held was"
            prompt = f"[user] {request}</s>"
            answer = f"[assistant] ## {document.title}\n\n{document.title} held is"
            before, ids = (tokenizer(part, return_tensors="pt").input_ids for part in (prompt, prompt + answer))
            with torch.no_grad():
                chances = model(input_ids=ids).logits[0, before.shape[1] - 1 : -1].log_softmax(-1)
            expected = -chances.gather(1, ids[0, before.shape[1] :, None]).sum().item()
            assert value == pytest.approx(expected, rel=1e-5)
            assert document.scored_bytes == len(answer)
