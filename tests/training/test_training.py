"""From packed rows to an adapter: what is supervised, and that training is repeatable and saves a loadable adapter."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from trainings import start, wait_until, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.base.model_folder import BaseModelError
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.dataset.dataset import DatasetShard, all_documents, load_rows
from ft_dagster.dataset.shard import Document
from ft_dagster.errors import TrainingError
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import IGNORED, collate
from ft_dagster.runtime.child import FAILED, exhausted
from ft_dagster.runtime.lease import CPU
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.__main__ import main
from ft_dagster.training.request import RESULT, WEIGHTS, TrainingRequest, training_key
from ft_dagster.training.train import train


def test_every_token_of_every_train_document_but_its_first_is_supervised_once(dataset: Path) -> None:
    rows = load_rows(Artifact.open(dataset), "train")
    supervised = sum(int((collate([row], 2)["labels"] != IGNORED).sum()) for row in rows)
    documents = [d for d in all_documents(Artifact.open(dataset)) if d.split == "train"]
    assert supervised == sum(d.tokens + 1 - 1 for d in documents)  # the end is supervised, the first token is not
    ends = sum(int((collate([row], 2)["labels"] == 2).sum()) for row in rows)
    assert ends == len(documents)


def test_each_supervised_token_counts_once_an_epoch_in_the_mean_loss_of_its_step(
    request_for: Callable[..., TrainingRequest], dataset: Path, tmp_path: Path
) -> None:
    request = request_for(
        lora={"dropout": 0.0},
        training={"epochs": 2, "learning_rate": 1e-12, "schedule": "constant", "rows_per_device": 1},
    )
    result = train(request, lambda _: None)
    artifact = Artifact.open(dataset)
    supervised = artifact.about["splits"]["train"]["supervised_tokens"]
    assert result["supervised_tokens"] == 2 * supervised
    rows = load_rows(artifact, "train")
    assert len(rows) % 4  # the last step of an epoch has fewer rows
    recipe = request.resolved_recipe()
    model = add_adapter(load_base(request.prepared_base(), recipe, tmp_path), request.prepared_base(), recipe)
    nats = sum(PackedModel(model, recipe).summed_nats(collate([row], 2)).item() for row in rows)
    steps = result["history"]
    assert sum(step["loss"] * step["supervised_tokens"] for step in steps) == pytest.approx(2 * nats, rel=1e-3)


def test_rewriting_supervises_answers_with_their_ends_and_no_token_of_a_prompt(
    make_dataset: Callable[..., Path], tiny_base: Path
) -> None:
    pairs = {n: {"original": f"{n} as it was", "improved": f"{n} as it is"} for n in "ABCDE"}
    reports = {"train": {"sections": pairs}, "held": {"sections": {"F": {"original": "was", "improved": "is"}}}}
    dataset = make_dataset(reports, held_out=["held"], block_length=256, text=0.0, rewrite=1.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    taught: list[str] = []
    for row in load_rows(Artifact.open(dataset), "train"):
        labels = collate([row], 2)["labels"][0]
        supervised = labels[labels != IGNORED]
        assert (supervised == torch.tensor(row["input_ids"])[labels != IGNORED]).all()
        taught += tokenizer.decode(supervised).split("</s>")[:-1]
    assert sorted(taught) == [f"[assistant] ## {n}\n\n{n} as it is" for n in "ABCDE"]


@pytest.mark.parametrize("objectives", [{"rewrite": 1.0}, {"text": 0.0, "rewrite": 1.0}, {"text": 0.5, "rewrite": 4.0}])
def test_the_loss_of_a_step_is_the_mean_over_tokens_weighted_by_objective(
    make_dataset: Callable[..., Path],
    request_for: Callable[..., TrainingRequest],
    tmp_path: Path,
    objectives: dict[str, float],
) -> None:
    pairs = {n: {"original": f"{n} as it was", "improved": f"{n} as it is"} for n in "ABCDE"}
    reports = {"train": {"sections": pairs}, "held": {"sections": {"F": {"original": "was", "improved": "is"}}}}
    dataset = make_dataset(reports, held_out=["held"], block_length=128, **objectives)
    rows = load_rows(Artifact.open(dataset), "train")
    options = {"epochs": 1, "rows_per_device": 1, "rows_per_step": len(rows), "learning_rate": 1e-12}
    request = replace(request_for(objectives=objectives, lora={"dropout": 0.0}, training=options), dataset=str(dataset))
    (step,) = train(request, lambda _: None)["history"]
    recipe = request.resolved_recipe()
    model = add_adapter(load_base(request.prepared_base(), recipe, tmp_path), request.prepared_base(), recipe)
    packed = PackedModel(model, recipe)
    total, weight = 0.0, 0.0
    for row in rows:
        start = 0
        for length, prompt, objective in zip(row["lengths"], row["prompts"], row["objectives"], strict=True):
            ids = row["input_ids"][start : start + length]
            piece = {"input_ids": ids, "lengths": [length], "prompts": [prompt]}
            each = (recipe.objectives.text, recipe.objectives.rewrite)[objective]
            total += each * packed.summed_nats(collate([piece], 2)).item()
            weight += each * (length - prompt)
            start += length
    assert step["loss"] == pytest.approx(total / weight, rel=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_in_one_row_do_not_see_each_other(tiny_base: Path, dataset: Path, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention)
    rows = [row for row in load_rows(Artifact.open(dataset), "train") if len(row["lengths"]) > 1]
    assert len(rows) >= 2
    batch = collate(rows[:2], 2)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for index, row in enumerate(rows[:2]):
            start = 0
            for length in row["lengths"]:
                alone = model(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0]
                assert torch.allclose(packed[index, start : start + length], alone, atol=1e-5)
                start += length


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_training_of_one_step_learns(request_for: Callable[..., TrainingRequest], schedule: str) -> None:
    result = train(request_for(training={"epochs": 1, "rows_per_step": 1000, "schedule": schedule}), lambda _: None)
    assert result["steps"] == 1 and result["largest_logit_change"] > 0


def test_training_makes_an_adapter_that_loads_with_plain_peft_and_transformers(
    request_for: Callable[..., TrainingRequest], tiny_base: Path
) -> None:
    request = request_for()
    told: list[dict[str, Any]] = []
    result = train(request, told.append)
    folder = Path(request.attempt) / "adapter"
    assert result["reloads"] and result["largest_logit_change"] > 0
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    assert [row["step"] for row in result["history"]] == list(range(1, result["steps"] + 1))
    assert told[-1]["step"] == result["steps"] and told[-1]["tokens_per_second"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("The committee", return_tensors="pt")).logits.isfinite().all()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base"] == request.prepared_base().identity and manifest["dataset"] == request.lineage["dataset"]
    assert list(Path(request.logs).rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("dropout", [0.1, 0.0], ids=["stock", "fused"])
def test_the_same_request_gives_the_same_bytes(request_for: Callable[..., TrainingRequest], dropout: float) -> None:
    first, second = request_for("first", lora={"dropout": dropout}), request_for("second", lora={"dropout": dropout})
    train(first, lambda _: None)
    train(second, lambda _: None)
    assert weights(first) == weights(second)


@pytest.mark.parametrize(
    "parts",
    [
        {"base": {"quantization": "nf4"}},
        {"base": {"quantization": "nf4"}, "training": {"gradient_checkpointing": True}},
        {"base": {"dtype": "bfloat16"}, "training": {"gradient_checkpointing": True}},
        {"training": {"attention": "eager", "optimizer": "adamw_bnb_8bit"}, "lora": {"targets": ["q_proj", "v_proj"]}},
        {"base": {"dtype": "float32"}},
    ],
    ids=["nf4", "nf4-checkpointing", "bf16-checkpointing", "eager-8bit-adam", "float32"],
)
def test_recipes_of_other_kinds_train_with_the_same_code(
    request_for: Callable[..., TrainingRequest], parts: dict[str, dict[str, Any]]
) -> None:
    request = request_for(**parts)
    result = train(request, lambda _: None)
    assert result["reloads"] and result["largest_logit_change"] > 0
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    trained = load_file(Path(request.attempt) / "adapter" / WEIGHTS)
    targets = parts.get("lora", {}).get("targets")
    assert targets is None or {name.split(".")[-3] for name in trained} == set(targets)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())


def test_a_loss_that_is_not_a_number_stops_training_and_says_what_to_change(
    request_for: Callable[..., TrainingRequest],
) -> None:
    with pytest.raises(TrainingError, match=r"step \d+\. Lower training.learning_rate"):
        train(request_for(training={"learning_rate": 1e30, "warmup": 0.0}), lambda _: None)


def test_a_dataset_without_a_supervised_token_is_refused_before_the_model_is_loaded(
    request_for: Callable[..., TrainingRequest], tmp_path: Path
) -> None:
    rows, store = (
        pa.table({"input_ids": [[5, 6]], "lengths": [[1, 1]], "prompts": [[1, 1]]}),
        Store(tmp_path / "single"),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    document = Document("a", "", "", "a.md", "train", 1, 1, 0, 0)
    figures, documents, blob = store.put_blobs(
        [b"{}", json.dumps(vars(document)).encode(), sink.getvalue().to_pybytes()]
    )
    with store.staging() as folder:
        (folder / "shards.json").write_text(
            json.dumps([vars(DatasetShard("", "", figures, documents, {"train": blob}))]), "utf-8"
        )
        single = store.commit("tokenized_dataset", "single", folder, {}).path
    with pytest.raises(TrainingError, match="nothing to learn"):
        train(TrainingRequest(**{**vars(request_for()), "dataset": str(single)}), lambda _: None)


def test_a_base_whose_weights_changed_is_refused(request_for: Callable[..., TrainingRequest]) -> None:
    request = request_for()
    other = TrainingRequest(**{**vars(request), "base": request.base | {"weights": "0" * 64}})
    with pytest.raises(BaseModelError, match="have changed"):
        train(other, lambda _: None)


def test_the_key_changes_only_with_what_decides_the_weights(tiny_recipe: dict[str, Any]) -> None:
    recipe: Recipe = resolve_recipe(tiny_recipe)
    key = training_key("dataset", {"weights": "w"}, recipe)
    assert key != training_key("other dataset", {"weights": "w"}, recipe)
    assert key != training_key("dataset", {"weights": "v"}, recipe)
    for part in ({"lora": {"rank": 5}}, {"objectives": {"rewrite": 0.5}}):
        assert key != training_key("dataset", {"weights": "w"}, resolve_recipe(tiny_recipe | part))
    elsewhere = tiny_recipe | {"name": "other", "evaluation": {"sample_tokens": 1}, "release": {"minimum_gain": 0.5}}
    assert key == training_key("dataset", {"weights": "w"}, resolve_recipe(elsewhere))


def test_a_second_training_on_a_device_waits_and_reports_it(request_for: Callable[..., TrainingRequest]) -> None:
    request = request_for()
    with FileLock(Path(request.locks) / f"{CPU.name}.lock"):
        process = start(request)
        wait_until(lambda: f"Another training or evaluation is using {CPU.name}; wait" in process.written(), process)
        assert not (Path(request.attempt) / RESULT).exists()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (Path(request.attempt) / RESULT).exists()


def test_a_failed_training_exits_with_code_1_and_its_reason(request_for: Callable[..., TrainingRequest]) -> None:
    process = start(request_for(training={"learning_rate": 1e30, "warmup": 0.0}))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Lower training.learning_rate" in errors


def test_without_enough_memory_training_exits_with_code_1_and_says_what_to_change(
    request_for: Callable[..., TrainingRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: object) -> None:
        torch.empty(2**55, dtype=torch.uint8)  # the error of the CPU's allocator, which has no class of its own

    monkeypatch.setattr("ft_dagster.training.train.train", too_much)
    request = request_for()
    assert main(request.write(Path(request.attempt) / "request.json")) == FAILED
    said = capsys.readouterr().err
    assert "can't allocate memory" in said
    assert "There is not enough memory. Lower training.rows_per_device" in said


@pytest.mark.parametrize("error", [ValueError("no memory of it"), RuntimeError("shapes do not match")])
def test_other_errors_are_not_mistaken_for_a_lack_of_memory(error: Exception, tmp_path: Path) -> None:
    assert exhausted(error, tmp_path) is None
