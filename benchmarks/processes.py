"""Run child processes and measure the cost of each, and make virtual environments with pinned packages."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ft_dagster.config.redaction import child_environment as without_secrets

READY = ".ready"


class ProcessError(Exception):
    """A process failed; the message contains the last line of its output."""


@dataclass(frozen=True)
class Cost:
    """The cost of one process, from its start to its end."""

    seconds: float
    cpu_seconds: float
    memory: int
    """Peak resident memory in bytes."""


def run(command: list[str], log: Path, environment: dict[str, str]) -> Cost:
    """Run a command until it exits, with its output written to a file.

    Raises:
        ProcessError: the exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        written = log.read_text("utf-8", errors="replace").strip().splitlines()
        last = next((line for line in reversed(written) if line.strip()), "it wrote nothing")
        raise ProcessError(f"exit code {process.returncode}: {last.strip()}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - began, cpu_seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def child_environment(home: Path, threads: int, path: Path | None = None) -> dict[str, str]:
    """Return a contender's environment variables: offline, with its own caches. How threads wait is up to each."""
    kept = {name: value for name, value in without_secrets().items() if name != "PYTHONPATH"}
    own = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | own | ({"PYTHONPATH": str(path)} if path else {})


def make_environment(requirements: Path, folder: Path) -> Path:
    """Make a virtual environment with the packages that a requirements file pins, once for each content of the file.

    Args:
        requirements: the file, whose name and hash form the name of the environment.
        folder: folder of all environments.

    Returns:
        The path of the environment's Python.

    Raises:
        ProcessError: pip failed.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    content = hashlib.sha256(version.encode() + requirements.read_bytes()).hexdigest()
    home = folder / f"{requirements.stem}-{content[:12]}"
    python = home / "bin" / "python"
    if not (home / READY).exists():
        print(f"installing {requirements.stem} into {home}", flush=True)
        log = home.with_suffix(".log")
        environment = dict(os.environ)
        run([sys.executable, "-m", "venv", "--clear", str(home)], log, environment)
        run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], log, environment)
        (home / READY).touch()
    return python
