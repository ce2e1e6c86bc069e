"""A device runs one training at a time, however many are requested."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster_dev import training_held, until_one_waits
from graphs import run
from processes import end_inheriting

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.instance import open_instance
from ft_dagster.defs.workspace import Workspace
from ft_dagster.training.request import KIND as ADAPTER

TRAIN = """
from graphs import run
from ft_dagster.defs.instance import open_instance
from ft_dagster.config.settings import load_settings
with open_instance(load_settings()) as instance:
    assert run(instance, "lora_adapter").success
"""
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def nothing_left(workspace: Path) -> Iterator[None]:
    yield
    end_inheriting("FT_WORKSPACE", str(workspace))


@contextmanager
def recipe(
    workspace: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **training: Any
) -> Iterator[None]:
    """Make processes that are started during the block use a recipe with these fields."""
    name = "-".join(map(str, training.values())) + ".yaml"
    (workspace / name).write_text(yaml.safe_dump(content | {"training": content["training"] | training}))
    with monkeypatch.context() as patch:
        patch.setenv("FT_RECIPE", name)
        yield


def trainings(instance: dg.DagsterInstance) -> list[tuple[float, float]]:
    """Return when training started and stopped, for each run that has trained."""
    found = []
    for run_ in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS])):
        steps = {s.step_key: s for s in instance.get_run_step_stats(run_.run_id)}
        if step := steps.get("lora_adapter"):
            found.append((step.start_time, step.end_time))
    return found


def train(
    workspace: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **training: Any
) -> subprocess.Popen[bytes]:
    """Start a process that trains with a recipe with these fields."""
    paths = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    with recipe(workspace, content, monkeypatch, **training):
        return subprocess.Popen([sys.executable, "-c", TRAIN], env=os.environ | {"PYTHONPATH": paths})


def test_of_two_recipes_requested_at_once_one_waits_and_both_give_the_right_adapter(
    workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_instance(load_settings()) as instance:
        assert run(instance, "raw_chapters", "sections", "tokenized_dataset").success
        started = [train(workspace, tiny_recipe, monkeypatch, seed=1)]
        with training_held(workspace):
            started.append(train(workspace, tiny_recipe, monkeypatch, seed=2))
            until_one_waits()
        assert [process.wait() for process in started] == [0, 0]
        (_, first_end), (second_start, _) = sorted(trainings(instance))
        assert first_end <= second_start
        adapters = list(Workspace().store.all(ADAPTER))
        assert len({adapter.files["adapter_model.safetensors"] for adapter in adapters}) == 2
        for adapter in adapters:
            adapter.verify()
