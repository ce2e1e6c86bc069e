"""`ft-dagster` as a process."""

import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "ft_dagster.cli"]


def ft_dagster(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def on_one_line(text: str) -> str:
    return " ".join(text.split())
