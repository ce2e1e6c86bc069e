"""A stopped training resumes from its last checkpoint and gives the result of an undisturbed one."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import start, wait_until, weights

from ft_dagster.training.attempts import last_checkpoint, mark_complete
from ft_dagster.training.checkpoints import last_complete
from ft_dagster.training.request import RESULT, TrainingRequest
from ft_dagster.training.train import train

FLIPS = int(os.environ.get("FAULTS", "1"))
"""How many positions of each file of a checkpoint are damaged, one after the other."""

NF4 = {"base": {"quantization": "nf4"}}
FUSED = {"lora": {"dropout": 0.0}}


class DiedError(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize(
    ("parts", "every"), [({}, True), (NF4, False), (FUSED, False)], ids=["with dropout", "nf4", "fused"]
)
def test_a_training_that_dies_at_any_step_ends_with_the_same_bytes_and_losses(
    request_for: Callable[..., TrainingRequest], parts: dict[str, Any], every: bool
) -> None:
    parts = parts | {"training": {"epochs": 2, "save_every": 1, "rows_per_step": 8}}
    undisturbed = request_for("undisturbed", **parts)
    expected = train(undisturbed, lambda _: None)
    assert expected["steps"] >= 4
    for step in range(1, expected["steps"] + 1) if every else (2, expected["steps"]):

        def die(metrics: dict[str, Any], step: int = step) -> None:
            if metrics.get("step") == step:  # before the checkpoint of this step is written
                raise DiedError

        stopped = request_for(f"stopped-{step}", **parts)
        with pytest.raises(DiedError):
            train(stopped, die)
        half_written = Path(stopped.attempt) / f"checkpoint-{step}"
        half_written.mkdir()
        (half_written / "adapter_model.safetensors").write_bytes(b"half")
        found = train(stopped, lambda _: None)
        assert found["resumed_from"] == step - 1
        assert found["history"] == expected["history"]
        assert weights(stopped) == weights(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_training_resumes_and_ends_with_the_bytes_of_one_never_stopped(
    request_for: Callable[..., TrainingRequest], number: signal.Signals
) -> None:
    stopped = request_for("stopped", training={"epochs": 4})
    undisturbed = request_for("undisturbed", training={"epochs": 4})
    process = start(stopped)
    wait_until(lambda: last_complete_exists(Path(stopped.attempt)), process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert not (Path(stopped.attempt) / RESULT).exists()
    assert train(stopped, lambda _: None)["resumed_from"] > 0
    train(undisturbed, lambda _: None)
    assert weights(stopped) == weights(undisturbed)


def last_complete_exists(attempt: Path) -> bool:
    return any(attempt.glob("checkpoint-*/complete"))


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_damaged_checkpoint_is_named_and_recomputed_from_the_one_before(
    request_for: Callable[..., TrainingRequest], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    parts = {"training": {"epochs": 2, "save_every": 2, "evaluate_every": 2}}
    undisturbed = request_for("undisturbed", **parts)
    expected = train(undisturbed, lambda _: None)
    stopped = request_for("stopped", **parts)

    def die(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == 6:
            raise DiedError

    with pytest.raises(DiedError):
        train(stopped, die)
    before, last = (Path(stopped.attempt) / f"checkpoint-{step}" for step in (2, 4))
    names = sorted(path.name for path in last.iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "complete"} <= set(names)
    for name in names:
        whole = (last / name).read_bytes()
        damages = [_flipped(whole, at) for at in range(0, len(whole), len(whole) // FLIPS + 1)]
        for data in (*damages, whole[: len(whole) // 2]):
            caplog.clear()
            (last / name).write_bytes(data)
            assert last_checkpoint(Path(stopped.attempt)) == before
            assert f"{last / name} is damaged" in caplog.text or "complete" in caplog.text
        (last / name).write_bytes(whole)
    assert last_checkpoint(Path(stopped.attempt)) == last
    (last / "optimizer.pt").write_bytes(_flipped((last / "optimizer.pt").read_bytes(), 700))
    found = train(stopped, lambda _: None)
    assert (found["resumed_from"], found["history"]) == (2, expected["history"])
    assert weights(stopped) == weights(undisturbed)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
