"""Starts training processes as the asset does, but without Dagster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import Forked

from ft_dagster.training.request import RESULT, WEIGHTS, TrainingRequest


def start(request: TrainingRequest) -> Forked:
    """Fork a training process; `communicate` returns its output."""
    path = request.write(Path(request.attempt) / "request.json")
    return Forked("ft_dagster.training", str(path), os.environ, path.with_suffix(".log"))


def start_interpreter(request: TrainingRequest) -> subprocess.Popen[str]:
    """Start a training process with a new interpreter, whose environment other processes can see."""
    path = request.write(Path(request.attempt) / "request.json")
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "ft_dagster.training", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: Forked | subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.03)


def weights(request: TrainingRequest) -> bytes:
    """Return the bytes of the adapter that a request made."""
    return (Path(request.attempt) / "adapter" / WEIGHTS).read_bytes()


def asked(processes: int, *parts: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Return parts of a recipe with four rows per step and an incomplete step at the end of each epoch."""
    changed: dict[str, Any] = {}
    for part in parts:
        changed |= {name: changed.get(name, {}) | fields for name, fields in part.items()}
    options = {"processes": processes, "rows_per_device": 1, "rows_per_step": 4, "epochs": 2}
    return changed | {"training": options | training}


def made(request: TrainingRequest) -> dict[str, Any]:
    """Return the adapter that a process, as a run would start it, makes of a request."""
    process = start(request)
    assert process.communicate()[1] is not None and process.returncode == 0
    return json.loads((Path(request.attempt) / RESULT).read_bytes())
