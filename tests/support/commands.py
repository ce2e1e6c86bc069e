"""Runs `ft-dagster` in this process or in a separate one, and sets the workspace it works in."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import chdir
from pathlib import Path

import pytest
from machines import remember_machine
from typer.testing import CliRunner

from ft_dagster.cli import app

COMMAND = [sys.executable, "-m", "ft_dagster.cli"]


def ft_dagster(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which need not load its libraries again.

    The output of the processes that `generate`, `chat` and `serve` start is not captured.
    Its log is on standard error, as in a process without log handlers. What it changes in this process is undone:
    the environment, handlers of signals, filters of warnings.
    """
    before, on_term = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert logging.lastResort
    logging.getLogger().addHandler(logging.lastResort)
    try:
        with chdir(folder or Path.cwd()), warnings.catch_warnings():
            done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"}, prog_name="ft-dagster")
    finally:
        logging.getLogger().removeHandler(logging.lastResort)
        gc.enable()
        signal.signal(signal.SIGTERM, on_term)
        os.environ.clear()
        os.environ.update(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def as_process(*arguments: str, folder: Path | None = None, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, as users type it; `said` is its standard input."""
    return subprocess.run([*COMMAND, *arguments], input=said, capture_output=True, text=True, check=False, cwd=folder)


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def work_in(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make commands work in a folder with `workspace/`, `home/` and `cache/`, created if missing; return the first."""
    for name in ("HUGGINGFACE_TOKEN", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)
    for name, value in {
        "FT_WORKSPACE": folder / "workspace",
        "FT_RECIPE": "recipe.yaml",
        "FT_CACHE": folder / "cache",
        "DAGSTER_HOME": folder / "home",
        "DAGSTER_DISABLE_TELEMETRY": "yes",
    }.items():
        patch.setenv(name, str(value))
    remember_machine(folder / "cache")
    return folder / "workspace"


def work_in_copy(finished: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make commands work in a copy of a workspace and its history."""
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    return work_in(folder, patch)
