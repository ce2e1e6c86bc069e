"""Early stopping keeps the best weights, changes nothing else, and works across a process that died."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.evaluation.evaluate import evaluate
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.model.manifest import read_manifest
from ft_dagster.training.early_stopping import EarlyStopping
from ft_dagster.training.request import RESULT, TrainingRequest
from ft_dagster.training.train import train

OVERFITTING = {"epochs": 12, "learning_rate": 0.05, "schedule": "constant"}
"""Held-out text whose loss rises again after a few steps."""


STRANGE = [f"{n % 7}%{n % 11}#{n % 5}@{n % 13}" for n in range(60)]
"""Text that is predicted worse the more prose the model was trained on."""


class KilledError(Exception):
    """Stands for a process that died."""


def weights(request: TrainingRequest) -> bytes:
    return (Path(request.attempt) / "adapter" / "adapter_model.safetensors").read_bytes()


def killed_at(step: int) -> Callable[[dict[str, Any]], None]:
    def tell(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == step and "loss" in metrics:
            raise KilledError

    return tell


def measured(values: list[float], patience: int | None) -> EarlyStopping:
    stopping = EarlyStopping(1, patience, lambda: 0.0, lambda _: None)
    stopping.measured = [{"step": step, "bits_per_byte": value} for step, value in enumerate(values, start=1)]
    return stopping


@pytest.mark.parametrize(
    ("values", "patience", "best", "over"),
    [
        ([3.0], 1, 1, False),
        ([3.0, 2.0, 2.5], 2, 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, 2, True),
        ([3.0, 2.0, 2.0], 1, 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, 4, False),
        ([3.0, 4.0, 5.0, 6.0], None, 1, False),
    ],
)
def test_training_stops_after_as_many_measurements_without_gain_as_its_patience(
    values: list[float], patience: int | None, best: int, over: bool
) -> None:
    stopping = measured(values, patience)
    assert (stopping.best["step"], stopping.over) == (best, over)


def test_training_does_not_stop_before_the_first_measurement() -> None:
    assert not measured([], 1).over


BASES = pytest.mark.parametrize(
    ("quantization", "dropout"),
    [("none", 0.0), ("none", 0.1), ("nf4", 0.1), ("int8", 0.1)],
    ids=["fused", "dropout", "nf4", "int8"],
)


@BASES
def test_measuring_changes_nothing_in_the_training(
    request_for: Callable[..., TrainingRequest], quantization: str, dropout: float
) -> None:
    parts = {"base": {"quantization": quantization}, "lora": {"dropout": dropout}}
    alone = train(request_for("alone", **parts), lambda _: None)
    watched = train(request_for("watched", **parts, training={"evaluate_every": 1}), lambda _: None)
    assert watched["history"] == alone["history"]
    assert [row["step"] for row in watched["held_out"]] == [row["step"] for row in alone["history"]]
    assert alone["held_out"] == [] and alone["kept_step"] == alone["steps"]


@BASES
def test_the_best_measured_adapter_is_kept_and_the_evaluation_measures_the_same(
    request_for: Callable[..., TrainingRequest],
    make_dataset: Callable[..., Path],
    prose: Callable[[int, int], str],
    tmp_path: Path,
    quantization: str,
    dropout: float,
) -> None:
    told: list[dict[str, Any]] = []
    training = {"evaluate_every": 3, "learning_rate": 0.02, "epochs": 4}
    request = request_for(base={"quantization": quantization}, lora={"dropout": dropout}, training=training)
    texts = {f"chapter_{n}": prose(n, 9 + n) for n in range(5)} | {"other": " ".join(STRANGE)}
    request = replace(request, dataset=str(make_dataset(texts, held_out=["other"])))
    result = train(request, told.append)
    best = min(result["held_out"], key=lambda row: row["bits_per_byte"])
    assert result["kept_step"] == best["step"] < result["steps"]
    assert result["held_out"][-1]["step"] == result["steps"], "the last step is measured, too"
    assert result["reloads"] and result["measuring_seconds_since_resume"] > 0
    assert read_manifest(Path(request.attempt) / "adapter").step == best["step"]
    assert [
        {"step": row["step"], "bits_per_byte": row["held_out_bits_per_byte"]}
        for row in told
        if "held_out_bits_per_byte" in row
    ] == result["held_out"]
    evaluation = evaluate(
        EvaluationRequest(
            base=request.base,
            dataset=request.dataset,
            recipe=request.recipe,
            adapters={"new": str(Path(request.attempt) / "adapter")},
            known={},
            output=str(tmp_path / "evaluation"),
            offload=str(tmp_path / "offload"),
            locks=request.locks,
        )
    )
    assert evaluation["models"]["new"]["bits_per_byte"] == best["bits_per_byte"]


@pytest.mark.parametrize("died_at", [2, 4, 8, "last"])
def test_a_resumed_training_stops_at_the_same_step_with_the_same_bytes(
    request_for: Callable[..., TrainingRequest], died_at: int | str
) -> None:
    training = OVERFITTING | {"evaluate_every": 2, "patience": 2, "save_every": 3}
    reference = request_for("reference", training=training)
    result = train(reference, lambda _: None)
    assert result["kept_step"] < result["steps"] < 12 * 5, "it stopped early"
    step = result["steps"] if died_at == "last" else int(died_at)
    request = request_for("died", training=training)
    with pytest.raises(KilledError):
        train(request, killed_at(step))
    again = train(request, lambda _: None)
    assert again["resumed_from"] == (step - 1) // 3 * 3
    assert {name: again[name] for name in ("steps", "kept_step", "held_out", "history")} == {
        name: result[name] for name in ("steps", "kept_step", "held_out", "history")
    }
    assert weights(request) == weights(reference)


@pytest.mark.parametrize(
    "training",
    [{"epochs": 1.5, "save_every": 1}, OVERFITTING | {"evaluate_every": 2, "patience": 1, "save_every": 2}],
    ids=["after the last step", "after it stopped early"],
)
def test_a_training_that_died_after_its_last_checkpoint_runs_no_further_step(
    request_for: Callable[..., TrainingRequest], training: dict[str, Any]
) -> None:
    request = request_for(training=training)
    result = train(request, lambda _: None)
    made = weights(request)
    attempt = Path(request.attempt)
    (attempt / RESULT).unlink()
    shutil.rmtree(attempt / "adapter")
    again = train(request, lambda _: None)
    assert again["resumed_from"] == again["steps"] == result["steps"]
    assert again["history"] == result["history"] and again["held_out"] == result["held_out"]
    assert weights(request) == made
    assert json.loads((attempt / RESULT).read_text())["tokens_since_resume"] == 0
