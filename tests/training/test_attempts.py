"""One attempt after the other, and beside one that was given up and is alive all the same."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainings import start, wait_until, weights

from ft_dagster.training.attempts import last_checkpoint, mark_complete, next_attempt
from ft_dagster.training.request import RESULT, TrainingRequest
from ft_dagster.training.train import train


def add_checkpoint(attempt: Path, step: int, complete: bool = True) -> None:
    folder = attempt / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_text(f"after step {step}")
    if complete:
        mark_complete(folder)


def test_an_attempt_goes_on_from_the_last_whole_checkpoint_of_all_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    first = next_attempt(folder)
    assert list(first.iterdir()) == []
    add_checkpoint(first, 8)
    add_checkpoint(first, 10)
    second = next_attempt(folder)
    assert [path.name for path in second.iterdir()] == ["checkpoint-10"]
    add_checkpoint(second, 12, complete=False)
    third = next_attempt(folder)
    assert last_checkpoint(third) == third / "checkpoint-10"
    assert (third / "checkpoint-10" / "weights").read_text() == "after step 10"
    assert len(list(folder.iterdir())) == 2, "there are never more than two, however often it dies"


def test_an_attempt_that_has_ended_is_not_made_again(tmp_path: Path) -> None:
    ended = next_attempt(tmp_path / "key")
    (ended / RESULT).write_text("{}")
    assert next_attempt(tmp_path / "key") == ended


def test_a_training_that_was_given_up_and_lives_does_no_harm(
    request_for: Callable[..., TrainingRequest], tmp_path: Path
) -> None:
    undisturbed = request_for("undisturbed", training={"epochs": 8})
    train(undisturbed, lambda _: None)
    given_up = replace(
        undisturbed, attempt=str(next_attempt(tmp_path / "key")), locks=str(tmp_path / "of another host")
    )
    process = start(given_up)
    wait_until(lambda: last_checkpoint(Path(given_up.attempt)) is not None, process)
    process.send_signal(signal.SIGSTOP)
    going_on = replace(undisturbed, attempt=str(next_attempt(tmp_path / "key")))
    process.send_signal(signal.SIGCONT)
    assert train(going_on, lambda _: None)["resumed_from"] > 0
    assert process.wait(120) == 0
    assert weights(going_on) == weights(given_up) == weights(undisturbed)
