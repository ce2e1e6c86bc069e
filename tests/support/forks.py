"""Training and evaluation processes forked from one that has their libraries loaded.

A new interpreter spends seconds of CPU time importing torch, transformers and peft before it does anything, dozens of
times in a run of the tests. How the product really starts its processes is tested elsewhere: by
tests/defs/runs/test_child_process.py, by the main job, through a real daemon, and in tests/system.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import IO

import pytest

from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.runtime.allocator import spin_briefly
from ft_dagster.runtime.parent import die_with_parent

MODULES = ("ft_dagster.training", "ft_dagster.evaluation")
_LOADED = ["ft_dagster.training.train", "ft_dagster.evaluation.evaluate", "frozen"]
"""What the server imports but never calls, because libgomp does not survive a fork after its threads have run."""
_FROM_THE_START = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
"""What the product sets for its processes and an interpreter reads only once."""

_context = multiprocessing.get_context("forkserver")


class Forked:
    """`python -m MODULE ARGUMENT` in its own session, with the part of `subprocess.Popen` that is used."""

    def __init__(self, module: str, argument: str, environment: Mapping[str, str], output: Path) -> None:
        """`output` receives its output."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in _FROM_THE_START.items():
                patch.setenv(name, value)
            spin_briefly()
            _context.set_forkserver_preload(_LOADED)
            forkserver.ensure_running()
        output.touch()
        self._process = _context.Process(target=_become, args=(module, argument, dict(environment), output))
        self._process.start()
        self._output = output
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def communicate(self) -> tuple[None, str]:
        self.wait()
        return None, self.written()

    def written(self) -> str:
        """Return what it has written so far."""
        return self._output.read_text("utf-8", "replace")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(module: str, argument: str, environment: Mapping[str, str], output: Path) -> None:
    die_with_parent()  # with the server, which exits when the tests do
    os.setsid()
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, argument]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _start(
    self: ChildProcess, module: str, request: Path, environment: Mapping[str, str], output: IO[bytes]
) -> Forked | subprocess.Popen[bytes]:
    if module not in MODULES:
        return _in_a_new_interpreter(self, module, request, environment, output)
    return Forked(module, str(request), environment, Path(output.name))


_in_a_new_interpreter = ChildProcess._start


@contextmanager
def forking() -> Iterator[None]:
    """During the block, runs in this process fork their training and evaluation processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChildProcess, "_start", _start)
        yield


def cpu_seconds() -> float:
    """Return the CPU time of the processes that have exited, including the start of the server."""
    server = forkserver._forkserver._forkserver_pid
    if server is None:
        return 0.0
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
