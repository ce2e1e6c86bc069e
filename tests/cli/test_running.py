"""What a run in a terminal prints before its stages start, and how it shows the progress of its training."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from embedded import fake_conversion
from rich.console import Console

from ft_dagster.cli.running import _Follower, _prepare_base
from ft_dagster.config.settings import load_settings
from ft_dagster.defs.workspace import Workspace
from ft_dagster.training.request import PROGRESS

CONTROLS = re.compile(r"\x1b\[[?\d]*[A-Za-z]")


@pytest.mark.parametrize(
    ("terminal", "said"),
    [(False, "Base model: converting tiny.gguf"), (True, "Base model converting tiny.gguf ✓ 0:00:00")],
)
def test_preparing_an_embedded_base_prints_one_line_per_step_and_happens_once(
    workspace: Path,
    tiny_base: Path,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    said: str,
) -> None:
    fake_conversion(monkeypatch, tmp_path / "package", tiny_base, tmp_path / "log")
    tiny_recipe["base"] = {"source": "embedded", "model": "tiny"}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, color_system=None)
    assert _prepare_base(Workspace(), console)
    assert not _prepare_base(Workspace(), console)
    (line,) = CONTROLS.sub("", written.getvalue().rpartition("\r")[2]).splitlines()
    assert re.sub(r"\d$", "0", line) == said
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_base_model_in_a_folder_needs_no_preparing(workspace: Path) -> None:
    written = io.StringIO()
    assert not _prepare_base(Workspace(), Console(file=written))
    assert written.getvalue() == ""


def test_only_the_training_of_the_run_itself_is_shown(workspace: Path) -> None:
    settings = load_settings()
    for run, step in (("mine", 3), ("another", 7)):
        attempt = settings.state / "attempts" / "key" / run
        attempt.mkdir(parents=True)
        (attempt / PROGRESS).write_text(json.dumps({"at": time.time(), "run": run, "step": step, "steps": 10}))
    with dg.DagsterInstance.ephemeral() as instance:
        for run, step in (("mine", 3), ("one that waits", 0)):
            follower = _Follower(instance, run, settings, Console(file=io.StringIO()))
            task = follower._progress.add_task("lora_adapter", total=None, note="")
            follower._show_training(task)
            assert follower._progress.tasks[task].completed == step
