"""The number format depends on the machine, and an attempt keeps the one that it started with."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_resume import DiedError
from trainings import weights

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.model.manifest import read_manifest
from ft_dagster.model.products import rates_here, time_products
from ft_dagster.runtime.machine import cores
from ft_dagster.runtime.number_format import (
    ProductRates,
    known_rates,
    machine_rates,
    remember_rates,
    slowness,
)
from ft_dagster.training.attempts import COMPLETE, attempt_in, mark_complete
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train

AVX2 = ProductRates("cpu", {"float32": 88e9, "bfloat16": 1.1e9})
AMX = ProductRates("cpu", {"float32": 120e9, "bfloat16": 800e9})
T4 = ProductRates("Tesla T4", {"float32": 4e12, "float16": 20e12})
H100 = ProductRates("H100", {"float32": 50e12, "bfloat16": 650e12, "float16": 650e12})


@pytest.mark.parametrize(
    ("rates", "chosen"), [(AVX2, "float32"), (AMX, "bfloat16"), (T4, "float16"), (H100, "bfloat16")]
)
def test_bfloat16_is_chosen_if_it_is_fast_and_otherwise_the_fastest_format(rates: ProductRates, chosen: str) -> None:
    assert rates.best == chosen and rates.slowdown(chosen) == 1


def test_this_machine_multiplies_fastest_in_the_format_that_it_chooses() -> None:
    rates = time_products()
    assert max(rates.rates.values()) <= rates.rates[rates.best] / 0.8


def test_a_machine_is_measured_once_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_rates(tmp_path) is None
    measured = machine_rates(tmp_path)
    assert known_rates(tmp_path) == rates_here(tmp_path) == machine_rates(tmp_path) == measured
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert known_rates(tmp_path) is None, "the same processor with fewer instructions is another machine"


def test_unreadable_measurements_of_a_machine_are_made_again(tmp_path: Path) -> None:
    remember_rates(tmp_path, AVX2)
    (path,) = (tmp_path / "machines").iterdir()
    path.write_text('{"device": "cpu"')
    assert known_rates(tmp_path) is None


def recipe(**base: Any) -> Recipe:
    return resolve_recipe({"name": "mine", "base": {"source": "embedded", "model": "m", **base}})


def test_a_format_is_called_slow_with_its_factor_and_the_line_of_the_recipe() -> None:
    assert "base.dtype: bfloat16" in str(slowness(recipe(dtype="bfloat16"), AVX2))
    assert "about 80 times as long as in float32" in str(slowness(recipe(dtype="bfloat16"), AVX2))
    assert "about 7 times as long as in bfloat16" in str(slowness(recipe(dtype="float32"), AMX))
    assert "cannot compute in" in str(slowness(recipe(dtype="bfloat16"), T4))
    mixed = recipe(dtype="float32").model_dump() | {"training": {"mixed_precision": "bf16"}}
    assert "training.mixed_precision: bf16 in the recipe is slow" in str(slowness(resolve_recipe(mixed), AVX2))
    for said in (recipe(), recipe(dtype="float32")):
        assert slowness(said, AVX2) is None


def test_cores_that_a_control_group_withholds_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_dagster.runtime.machine._cgroups", lambda: [tmp_path])
    there = cores()
    for quota, found in (("max 100000", there), ("50000 100000", 1), (f"{(there + 7) * 100000} 100000", there)):
        (tmp_path / "cpu.max").write_text(quota)
        assert cores() == found


Requests = Callable[..., TrainingRequest]
SHORT = {"training": {"epochs": 1, "save_every": 1}, "lora": {"dropout": 0.0}}


def on(monkeypatch: pytest.MonkeyPatch, rates: ProductRates) -> None:
    """Make this machine appear as fast as another one."""
    monkeypatch.setattr("ft_dagster.training.attempt_format.rates_here", lambda _: rates)


def stopped_at_the_second_step(request: TrainingRequest) -> TrainingRequest:
    return stopped_at(2, request)


def stopped_at(step: int, request: TrainingRequest) -> TrainingRequest:
    def die(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == step:
            raise DiedError

    with pytest.raises(DiedError):
        train(request, die)
    return request


def test_auto_trains_in_the_machines_format_and_the_manifest_names_it(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rates in (AVX2, AMX):
        on(monkeypatch, rates)
        auto, named = (
            request_for(f"auto-{rates.best}", **SHORT),
            request_for(rates.best, base={"dtype": rates.best}, **SHORT),
        )
        assert train(auto, lambda _: None)["number_format"] == rates.best
        train(named, lambda _: None)
        assert weights(auto) == weights(named)
        manifest = read_manifest(Path(auto.attempt) / "adapter")
        assert (manifest.number_format, manifest.recipe["base"]["dtype"]) == (rates.best, "auto")


def test_an_attempt_resumes_in_the_format_that_it_started_with(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, AVX2)
    undisturbed, stopped = request_for("undisturbed", **SHORT), request_for("stopped", **SHORT)
    train(undisturbed, lambda _: None)
    stopped_at_the_second_step(stopped)
    on(monkeypatch, AMX)  # slower in float32 than in its own format, but by less than starting over costs
    found = train(stopped, lambda _: None)
    assert (found["number_format"], found["resumed_from"]) == ("float32", 1)
    assert weights(stopped) == weights(undisturbed)


def test_a_machine_that_cannot_resume_in_an_attempts_format_reports_it_and_restarts(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    on(monkeypatch, AMX)
    stopped = stopped_at_the_second_step(request_for("stopped", **SHORT))
    on(monkeypatch, AVX2)
    found = train(stopped, lambda _: None)
    assert (found["number_format"], found["resumed_from"]) == ("float32", 0)
    assert "Training starts over: its checkpoint-1 was made in bfloat16" in caplog.text


def test_an_attempt_resumes_in_its_own_format_even_if_an_earlier_one_got_further(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def next_request() -> TrainingRequest:
        with attempt_in(tmp_path / "attempts") as attempt:
            return replace(request_for(**SHORT), attempt=str(attempt))

    on(monkeypatch, AMX)
    stopped_at(5, next_request())
    on(monkeypatch, AVX2)
    stopped_at(3, next_request())
    found = train(next_request(), lambda _: None)
    assert (found["number_format"], found["resumed_from"]) == ("float32", 2)


def test_checkpoints_without_a_number_format_are_in_bfloat16(
    request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, AMX)
    stopped = stopped_at_the_second_step(request_for("stopped", **SHORT))
    (checkpoint,) = Path(stopped.attempt).glob("checkpoint-*")
    for name in ("number_format", COMPLETE):
        (checkpoint / name).unlink()
    mark_complete(checkpoint)
    found = train(stopped, lambda _: None)
    assert (found["number_format"], found["resumed_from"]) == ("bfloat16", 1)
    assert json.loads((Path(stopped.attempt) / "result.json").read_bytes())["number_format"] == "bfloat16"
