"""Attempts follow one another, even next to an abandoned one that is still alive."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainings import start, wait_until, weights

from ft_dagster.training.attempts import attempt_in, last_checkpoint, mark_complete
from ft_dagster.training.request import RESULT, TrainingRequest
from ft_dagster.training.train import train


def add_checkpoint(attempt: Path, step: int, complete: bool = True) -> None:
    folder = attempt / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_text(f"after step {step}")
    if complete:
        mark_complete(folder)


def begun(folder: Path) -> Path:
    """Return an attempt that no process holds any more."""
    with attempt_in(folder) as attempt:
        return attempt


def attempts(folder: Path) -> set[Path]:
    return {path for path in folder.iterdir() if path.is_dir()}


def test_an_attempt_resumes_from_the_last_complete_checkpoint_of_all_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    first = begun(folder)
    assert not [path for path in first.iterdir() if path.is_dir()]
    add_checkpoint(first, 8)
    add_checkpoint(first, 10)
    second = begun(folder)
    assert [path.name for path in second.iterdir() if path.is_dir()] == ["checkpoint-10"]
    add_checkpoint(second, 12, complete=False)
    third = begun(folder)
    assert last_checkpoint(third) == third / "checkpoint-10"
    assert (third / "checkpoint-10" / "weights").read_text() == "after step 10"
    assert len(attempts(folder)) == 2, "there are never more than two, however often it dies"


def test_an_attempt_that_another_run_trains_in_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    with attempt_in(folder) as first, attempt_in(folder) as second:
        assert attempts(folder) == {first, second}
        add_checkpoint(second, 4)
        with attempt_in(folder) as third:
            assert attempts(folder) == {first, second, third}
    begun(folder)
    assert len(attempts(folder)) == 2, "nobody holds them any more"


def test_a_finished_attempt_is_not_repeated(tmp_path: Path) -> None:
    finished = begun(tmp_path / "key")
    (finished / RESULT).write_text("{}")
    assert begun(tmp_path / "key") == finished


def test_an_abandoned_training_that_is_still_alive_does_no_harm(
    request_for: Callable[..., TrainingRequest], tmp_path: Path
) -> None:
    undisturbed = request_for("undisturbed", training={"epochs": 8})
    train(undisturbed, lambda _: None)
    given_up = replace(undisturbed, attempt=str(begun(tmp_path / "key")), locks=str(tmp_path / "of another host"))
    process = start(given_up)
    wait_until(lambda: last_checkpoint(Path(given_up.attempt)) is not None, process)
    process.send_signal(signal.SIGSTOP)
    going_on = replace(undisturbed, attempt=str(begun(tmp_path / "key")))
    process.send_signal(signal.SIGCONT)
    assert train(going_on, lambda _: None)["resumed_from"] > 0
    assert process.wait(120) == 0
    assert weights(going_on) == weights(given_up) == weights(undisturbed)
