"""Child processes with what each of them alone cost, and virtual environments with pinned packages."""

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
    """A process did not end well; the message is the end of what it wrote."""


@dataclass(frozen=True)
class Cost:
    """Of one process, from its start to its end."""

    seconds: float
    cpu_seconds: float
    memory: int
    """Bytes: the most that it held at a time."""


def run(command: list[str], log: Path, environment: dict[str, str]) -> Cost:
    """Run a command to its end; what it writes goes to a file.

    Raises:
        ProcessError: it ended with another code than 0.
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
    """What every contender sees: no hub, and caches of its own. How threads wait is left to each."""
    kept = {name: value for name, value in without_secrets().items() if name != "PYTHONPATH"}
    own = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | own | ({"PYTHONPATH": str(path)} if path else {})


def make_environment(requirements: Path, folder: Path) -> Path:
    """A virtual environment with what a requirements file pins, made once for each content of it.

    Args:
        requirements: the file; its name and a hash of its content name the environment.
        folder: for all environments.

    Returns:
        The environment's Python.

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
