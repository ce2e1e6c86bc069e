"""Training processes, as the asset starts them but without Dagster."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forks import Forked

from ft_dagster.training.request import WEIGHTS, TrainingRequest


def start(request: TrainingRequest) -> Forked:
    """A training process, forked; `communicate` gives what it wrote."""
    path = request.write(Path(request.attempt) / "request.json")
    return Forked("ft_dagster.training", str(path), os.environ, path.with_suffix(".log"))


def start_anew(request: TrainingRequest) -> subprocess.Popen[str]:
    """A training process with an interpreter of its own, which shows its environment to others."""
    path = request.write(Path(request.attempt) / "request.json")
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "ft_dagster.training", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: Forked | subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.01)


def weights(request: TrainingRequest) -> bytes:
    """The bytes of the adapter that a request made."""
    return (Path(request.attempt) / "adapter" / WEIGHTS).read_bytes()
