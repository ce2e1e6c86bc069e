"""The probe before training reports whether it fits and how long it takes, without changing the result."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ft_dagster.base.model_folder import model_config
from ft_dagster.errors import TrainingError
from ft_dagster.model.products import decided
from ft_dagster.training.probe import fullest, try_batch
from ft_dagster.training.progress import Progress
from ft_dagster.training.request import PROGRESS, TrainingRequest
from ft_dagster.training.sizing.estimate import memory_estimate
from ft_dagster.training.sizing.memory import require_memory
from ft_dagster.training.sizing.speeds import recall_speed, speed_key
from ft_dagster.training.train import train

Requests = Callable[..., TrainingRequest]


def estimated(request: TrainingRequest) -> int:
    config = model_config(Path(request.prepared_base().folder))
    return memory_estimate(config, decided(request.resolved_recipe()), on_gpu=False).total


def test_a_training_that_cannot_fit_is_refused_before_weights_are_loaded(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(tokens={"block_length": 8192}, training={"rows_per_device": 4, "rows_per_step": 4})
    room = estimated(request) * 2 // 3
    monkeypatch.setattr("ft_dagster.training.sizing.memory.available_memory", lambda: room)
    monkeypatch.setattr("ft_dagster.training.train.load_base", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(TrainingError) as error:
        train(request, lambda _: None)
    message = str(error.value)
    assert f"{estimated(request) / 2**30:.2f} GiB (frozen weights" in message and "activations" in message
    assert f"{room / 2**30:.2f} GiB of memory are available" in message
    assert "With training.rows_per_device: 2 in the recipe it would take about" in message


def test_a_training_that_may_not_fit_starts_with_a_warning(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for()
    monkeypatch.setattr("ft_dagster.training.sizing.memory.available_memory", lambda: estimated(request) * 9 // 10)
    with caplog.at_level(logging.WARNING):
        assert train(request, lambda _: None)["estimate"]["memory_bytes"] == estimated(request)
    assert "Memory may not be enough" in caplog.text


def test_weights_are_the_same_with_and_without_a_probe_and_its_estimate_comes_first(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    requests = {name: request_for(name, lora={"dropout": 0.2}, training={"epochs": 2}) for name in told}
    for name, cost in (("with", 1.0), ("without", 0.0)):
        monkeypatch.setattr("ft_dagster.training.probe.COST", cost)
        result = train(requests[name], told[name].append)
        assert (result["estimate"]["seconds"] is not None) == (name == "with")
    first = told["with"][0]
    assert first["estimated_seconds"] > 0 and first["peak_memory_bytes"] > 0 and "step" not in first
    assert not any("estimated_seconds" in row for row in told["without"])
    tried, plain = (Path(request.attempt) / "adapter" / "adapter_model.safetensors" for request in requests.values())
    assert tried.read_bytes() == plain.read_bytes()


def test_the_cost_of_a_training_is_remembered_for_the_next_of_its_shape(request_for: Requests) -> None:
    request = request_for()
    result = train(request, lambda _: None)
    config, recipe = model_config(Path(request.prepared_base().folder)), decided(request.resolved_recipe())
    speed = recall_speed(Path(str(request.speeds)), speed_key(config, recipe, None))
    assert speed is not None and speed.device == "cpu"
    assert speed.tokens_per_second == result["tokens_per_second"]
    assert recall_speed(Path(str(request.speeds)), speed_key(config, recipe, 1)) is None
    other = decided(request_for(lora={"rank": 3}).resolved_recipe())
    assert recall_speed(Path(str(request.speeds)), speed_key(config, other, None)) is None
    longer = decided(request_for(training={"epochs": 9, "learning_rate": 0.1}).resolved_recipe())
    assert recall_speed(Path(str(request.speeds)), speed_key(config, longer, None)) == speed


def test_the_probe_uses_the_longest_rows() -> None:
    rows = [{"input_ids": [1] * length, "lengths": [length]} for length in (3, 9, 5, 9)]
    assert [len(row["input_ids"]) for row in fullest(rows, 2)] == [9, 9]
    assert fullest(rows, 9) == [rows[1], rows[3], rows[2], rows[0]]


def test_a_base_that_does_not_fit_on_the_gpu_is_refused_before_weights_are_loaded(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(base={"dtype": "bfloat16"})
    base, recipe = request.prepared_base(), request.resolved_recipe()
    needed = memory_estimate(model_config(Path(base.folder)), recipe, on_gpu=True)
    monkeypatch.setattr("ft_dagster.training.sizing.memory.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("ft_dagster.training.sizing.memory.available_memory", lambda: round(needed.total / 1.3))
    with pytest.raises(TrainingError, match=r"This training does not fit: .* of GPU memory are available\."):
        require_memory(base, recipe)
    monkeypatch.setattr("ft_dagster.training.sizing.memory.available_memory", lambda: needed.total)
    assert require_memory(base, recipe) == needed


def test_the_last_of_several_probe_passes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moments = torch.nn.Linear(2, 1), iter([0.0, 30.0, 31.0, 33.0])
    monkeypatch.setattr("ft_dagster.training.probe.time.monotonic", lambda: next(moments))
    assert try_batch(model, {"x": torch.ones(1, 2)}, lambda batch: model(batch["x"]).sum(), passes=2) == 2.0
    assert model.weight.grad is None


def test_progress_shows_the_expected_time_from_the_start(tmp_path: Path) -> None:
    progress = Progress(tmp_path, lambda: 0, lambda _: None)
    progress.expected_seconds = 12.5
    progress.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(max_steps=3), TrainerControl())
    assert json.loads((tmp_path / PROGRESS).read_bytes())["seconds_left"] == 12.5


def test_a_training_that_takes_far_longer_than_estimated_reports_it_once(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    progress = Progress(tmp_path, lambda: 0, told.append, expected_seconds=600.0)
    progress.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(max_steps=3), TrainerControl())
    progress.compare(10 * 600.0)
    assert told == []
    for _ in range(2):
        progress.compare(4 * 3600.0)
    assert [sorted(row) for row in told] == [["warning"]]
    assert "about 4.0 h, not 10 min as was estimated" in told[0]["warning"]
    progress.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(max_steps=3), TrainerControl())
    assert json.loads((tmp_path / PROGRESS).read_bytes())["warning"] == told[0]["warning"]


def test_the_first_steps_are_compared_with_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("ft_dagster.training.progress.time.monotonic", lambda: next(clock))
    told: list[dict[str, Any]] = []
    progress = Progress(tmp_path, lambda: 0, told.append, expected_seconds=600.0)
    state, row = TrainerState(max_steps=100), {"loss": 1.0, "learning_rate": 0.1}
    progress.on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl())
    for state.global_step in (1, 2):
        progress.on_log(TrainingArguments(str(tmp_path)), state, TrainerControl(), row)
    assert any("warning" in row for row in told)
