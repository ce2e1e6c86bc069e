"""Canceling a run in the UI stops its training and all children, whether or not they respond."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from commands import COMMAND
from dagster_dev import DagsterDev, wait_until
from dagster_ui import Run, slots_taken, terminate
from processes import is_asked_to_stop, suspended

from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.store.local import Store
from ft_dagster.training.request import KIND as ADAPTER

_GRACE = ChildProcess().grace_seconds
_TRAINING = {"run", "training", "torchrun", "one of several that train"}
"""The processes that exist while a run trains, and only then."""


@pytest.fixture(scope="module")
def dev(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    folder = tmp_path_factory.mktemp("cancelled")
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    with DagsterDev(folder) as dev:
        dev.until_up_to_date()
        yield dev


def training_of_an_edit(dev: DagsterDev, **training: int) -> tuple[Run, list[psutil.Process]]:
    """Change the recipe and return the run that the sensor requests, with its training processes in mid-step."""
    path = dev.workspace / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    # Only a request to stop saves a checkpoint.
    recipe["training"] |= {"epochs": 12, "save_every": 100_000, **training}
    path.write_text(yaml.safe_dump(recipe))
    dev.until_training()
    kind = "training" if training["processes"] == 1 else "one of several that train"
    return dev.runs()[-1], dev.kinds()[kind]


def is_over(dev: DagsterDev, run: Run, seconds: float) -> None:
    """Wait until a run is canceled and no process of it is alive or holds the slot."""
    wait_until(lambda: not dev.kinds().keys() & _TRAINING, "no process of the run is left", seconds)
    wait_until(lambda: dev.runs()[-1].status == "CANCELED", "the run is cancelled", seconds=60)
    assert dev.runs()[-1].id == run.id and slots_taken(dev.address) == 0


def checkpoints(dev: DagsterDev) -> list[Path]:
    return [path.parent for path in (dev.workspace / ".ft" / "attempts").glob("*/*/checkpoint-*/complete")]


def resumed_from(dev: DagsterDev) -> int:
    """Run again, as the user who canceled would, and return the step at which training resumed."""
    done = subprocess.run([*COMMAND, "run"], env=dev.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    newest = Store(dev.workspace / ".ft" / "store").newest(ADAPTER)
    assert newest
    return int(newest.about["resumed_from"])


@pytest.mark.parametrize("processes", [1, 2])
def test_canceled_training_saves_within_thirty_seconds_and_the_next_run_resumes_it(
    dev: DagsterDev, processes: int
) -> None:
    run, training = training_of_an_edit(dev, processes=processes, seed=processes)
    with suspended(training):  # it takes seconds, and would finish before it is asked to stop
        terminate(dev.address, run.id)
        wait_until(lambda: all(map(is_asked_to_stop, training)), "it is asked to stop")
    is_over(dev, run, seconds=30)
    (checkpoint,) = checkpoints(dev)
    assert resumed_from(dev) == int(checkpoint.name.rpartition("-")[2]) > 0
    assert not checkpoints(dev)


def test_a_training_that_does_not_respond_is_killed_after_the_grace_period(dev: DagsterDev) -> None:
    run, training = training_of_an_edit(dev, processes=2, seed=3)
    assert len(training) == 2
    with suspended(training):
        terminate(dev.address, run.id)
        is_over(dev, run, seconds=_GRACE + 30)
    assert not checkpoints(dev), "it could not save one"
