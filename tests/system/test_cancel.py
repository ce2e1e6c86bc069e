"""A run that a person cancels in the UI stops its training, children included, whether or not they heed it."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from commands import COMMAND
from dagster_dev import DagsterDev, wait_until
from dagster_ui import Run, slots_taken, terminate

from ft_dagster.defs.child_process import ChildProcess
from ft_dagster.store import Store
from ft_dagster.training.request import KIND as ADAPTER

_GRACE = ChildProcess().grace_seconds
_TRAINING = {"run", "training", "torchrun", "one of several that train"}
"""What lives while a run trains, and must be gone when it does not."""


@pytest.fixture(scope="module")
def dev(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    folder = tmp_path_factory.mktemp("cancelled")
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    with DagsterDev(folder) as dev:
        dev.until_up_to_date()
        yield dev


def training_of_an_edit(dev: DagsterDev, **training: int) -> Run:
    """Change the recipe; give the run that the watcher asks for, with its training under way."""
    path = dev.workspace / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    # Nothing saves a checkpoint but being asked to stop.
    recipe["training"] |= {"epochs": 40, "save_every": 100_000, **training}
    path.write_text(yaml.safe_dump(recipe))
    dev.until_training()
    return dev.runs()[-1]


def cancelled(dev: DagsterDev, run: Run, seconds: float) -> None:
    """Cancel a run, and wait until it says so and nothing of it lives or holds the slot."""
    terminate(dev.address, run.id)
    wait_until(lambda: not dev.kinds().keys() & _TRAINING, "no process of the run is left", seconds)
    wait_until(lambda: dev.runs()[-1].status == "CANCELED", "the run is cancelled", seconds=60)
    assert dev.runs()[-1].id == run.id and slots_taken(dev.address) == 0


def checkpoints(dev: DagsterDev) -> list[Path]:
    return [path.parent for path in (dev.workspace / ".ft" / "attempts").glob("*/*/checkpoint-*/complete")]


def resumed_from(dev: DagsterDev) -> int:
    """Run again, as the person who cancelled does; give the step at which training went on."""
    done = subprocess.run([*COMMAND, "run"], env=dev.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    newest = Store(dev.workspace / ".ft" / "store").newest(ADAPTER)
    assert newest
    return int(newest.about["resumed_from"])


@pytest.mark.parametrize("processes", [1, 2])
def test_training_saves_and_stops_within_thirty_seconds_and_the_next_run_goes_on_from_there(
    dev: DagsterDev, processes: int
) -> None:
    run = training_of_an_edit(dev, processes=processes, seed=processes)
    cancelled(dev, run, seconds=30)
    (checkpoint,) = checkpoints(dev)
    assert resumed_from(dev) == int(checkpoint.name.rpartition("-")[2]) > 0
    assert not checkpoints(dev)


def test_a_training_that_does_not_react_is_killed_after_the_grace_period(dev: DagsterDev) -> None:
    run = training_of_an_edit(dev, processes=2, seed=3)
    both = dev.kinds()["one of several that train"]
    assert len(both) == 2
    for process in both:
        process.send_signal(signal.SIGSTOP)
    wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in both), "both stand still")
    cancelled(dev, run, seconds=_GRACE + 30)
    assert not checkpoints(dev), "it could not save one"
    assert resumed_from(dev) == 0
