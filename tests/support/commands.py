"""`ft-dagster` as a process, and where it works."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machines import remember_machine

COMMAND = [sys.executable, "-m", "ft_dagster.cli"]


def ft_dagster(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def work_in(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Have commands work in a folder with `workspace/`, `home/` and `cache/`, made where missing; give the first."""
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
    """The same in a copy of a workspace and its history."""
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    return work_in(folder, patch)
