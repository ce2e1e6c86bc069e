"""Starts, watches, stops and kills `dagster dev` in a test, with all processes that it started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster_ui import Asset, Run, Tick, answers, asset, is_running, runs, ticks
from machines import remember_machine
from processes import accept_ctrl_c, command_of, free_port, inheriting, suspended

from ft_dagster.config.settings import Settings
from ft_dagster.defs.instance import prepare_home
from ft_dagster.defs.runs.orphans import end_orphans
from ft_dagster.defs.stages import STAGES
from ft_dagster.defs.workspace import GPU_POOL
from ft_dagster.runtime.processes import RENDEZVOUS

PROJECT = Path(__file__).parents[2]
UP_TO_DATE = "Everything is up to date."
WRITING = "somebody may be writing"
_WAIT_SECONDS = 240
_QUICK_QUEUE = "\nrun_queue:\n  dequeue_interval_seconds: 1\n"
"""For DAGSTER_HOME's dagster.yaml: a requested run starts after one second instead of five."""

_KINDS = {
    "dagster dev": "dagster dev",
    "web server": "dagster_webserver",
    "daemon": "dagster._daemon",
    "code server": "dagster code-server start",
    "code": "dagster api grpc",
    "run": "multiprocessing.spawn",
    "torchrun": "torch.distributed.run",
    "training": "-m ft_dagster.training",
    "evaluation": "-m ft_dagster.evaluation",
}
"""Kind of process -> text in its command. The server with the code is a child of the code server, and the
steps of a run are in the run's process."""


@dataclass(frozen=True)
class Made:
    """What training and evaluation processes leave behind; it changes with every such process."""

    adapters: frozenset[str]
    """Keys of the adapters in the store."""
    trainings: frozenset[tuple[str, int]]
    """Names and sizes of the logs of training processes."""
    evaluations: frozenset[tuple[str, int]]
    """Names and sizes of the logs of evaluation processes."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = _WAIT_SECONDS, pause: float = 1.0) -> Any:
    """Poll until the condition is true and return its value; fail, naming what was waited for, if that takes too long.

    Polling costs the servers a share of a core, so the longer it takes, the less often they are polled.

    Args:
        condition: the condition that is polled.
        what: what is waited for, for the message.
        seconds: how long it may stay false.
        pause: the longest time between two polls, in seconds.
    """
    until, next_pause = time.monotonic() + seconds, 0.1
    while not (answer := condition()):
        assert time.monotonic() < until, f"waited {seconds:g} s in vain until {what}"
        time.sleep(next_pause)
        next_pause = min(1.3 * next_pause, pause)
    return answer


@contextmanager
def training_held(workspace: Path) -> Iterator[None]:
    """Wait for a training to be under way in a workspace, and suspend it in mid-step during the block."""
    attempts = workspace / ".ft" / "attempts"
    wait_until(lambda: any(attempts.glob("*/*/checkpoint-*/complete")), "a training is under way", pause=0.1)
    with suspended(p for p in inheriting("FT_WORKSPACE", str(workspace)) if "ft_dagster.training" in command_of(p)):
        yield


def until_one_waits() -> None:
    """Wait until a run waits for the device, in the history that DAGSTER_HOME names."""
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        storage = instance.event_log_storage
        wait_until(lambda: storage.get_concurrency_info(GPU_POOL).pending_step_count, "a run waits for the device")


class DagsterDev:
    """`dagster dev` on one workspace: web server, daemon and code server, through workspace.yaml as in `make dev`.

    A context manager, which stops all that it started at its exit, however the test finished.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        """`folder` contains `workspace/`, and `home/` if there is a history. Settings are variables such as FT_..."""
        self.workspace = folder / "workspace"
        self.home = folder / "home"
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None
        ours = ("FT_", "DAGSTER_", "HUGGINGFACE_", "MAKE")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "FT_WORKSPACE": str(self.workspace),
            "FT_CACHE": str(folder / "cache"),
            "FT_RECIPE": "recipe.yaml",
            "FT_WATCH_SECONDS": "1",
            "FT_SETTLE_SECONDS": "1",
            "DAGSTER_HOME": str(self.home),
            **settings,
        }
        remember_machine(Path(self.environment["FT_CACHE"]))

    def __enter__(self) -> "DagsterDev":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Life and death

    def start(self) -> None:
        """Start it, and wait until its UI answers."""
        if not (self.home / "dagster.yaml").exists():
            with pytest.MonkeyPatch.context() as patch:
                for name in [name for name in self.environment if name.startswith("DAGSTER_POSTGRES_")]:
                    patch.setenv(name, self.environment[name])
                prepare_home(Settings(workspace=self.workspace, DAGSTER_HOME=self.home))
            config = self.home / "dagster.yaml"
            config.write_text(config.read_text() + _QUICK_QUEUE)
        end_orphans(str(self.home))  # as `make dev` does
        port = str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        with (self.workspace.parent / "dagster-dev.log").open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                cwd=PROJECT,
                env=self.environment | {"DAGSTER_WEBSERVER_PORT": port},
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=accept_ctrl_c,
            )
        try:
            wait_until(lambda: self._process.poll() is not None or answers(self.address), "the UI answers")
            assert self._process.poll() is None, "`dagster dev` has ended by itself"
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop it as Ctrl-C does, and kill what is left after a minute."""
        if self._process is None:
            return
        try:
            with suppress(subprocess.TimeoutExpired):
                self._interrupt(self._process)
                self._process.wait(60)
        finally:
            while self.processes():
                self.kill()

    def kill(self, spare: str = "") -> None:
        """Send SIGKILL to all of its processes at once, in any session, as in a power failure.

        Args:
            spare: a module whose processes are not killed; they may exit on their own.
        """
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if spare not in command_of(process):
                    process.kill()
        if self._process is not None:
            self._process.wait()

    def until_ended(self) -> None:
        """Wait until `dagster dev` itself has exited; what it started may survive."""
        if self._process is not None:
            self._process.wait(120)

    def interrupt(self) -> None:
        """Ask it to exit, as Ctrl-C does, and wait until it has."""
        assert self._process is not None
        self._interrupt(self._process)
        self.until_ended()

    def until_gone(self, seconds: float = 30) -> None:
        """Wait until no process works on the workspace any more; one that survives is orphaned."""
        wait_until(lambda: not self.processes(), "no process is left", seconds)

    def processes(self) -> list[psutil.Process]:
        """Return every living process that works on this workspace, whatever its parent is now.

        They are recognized by the environment that they inherited.
        """
        return inheriting("FT_WORKSPACE", str(self.workspace))

    def kinds(self) -> dict[str, list[psutil.Process]]:
        """Return its living processes by kind; those of no kind are left out."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.processes():
            with suppress(psutil.Error):
                command = " ".join(command_of(process))
                if kind := next((kind for kind, part in _KINDS.items() if part in command), None):
                    alone = kind != "training" or RENDEZVOUS not in process.environ()
                    found.setdefault(kind if alone else "one of several that train", []).append(process)
        return found

    def _command(self) -> list[str]:
        return [str(Path(sys.executable).with_name("dagster")), "dev", "-w", "workspace.yaml", "-h", "127.0.0.1"]

    def _interrupt(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGINT)

    # What it has done

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return runs(self.address)

    def watches(self) -> bool:
        """Return whether the sensor is on."""
        return is_running(self.address)

    def until_up_to_date(self) -> None:
        """Wait for a tick of the sensor that starts after this call and finds nothing to do."""
        self.until_skipped(UP_TO_DATE)

    def until_skipped(self, why: str) -> None:
        """Wait for a tick of the sensor that starts after this call and requests no run for this reason."""
        now = time.time()
        wait_until(lambda: any(why in tick.skipped for tick in self.ticks_since(now, 20)), f"a tick says {why!r}")

    def ticks_since(self, moment: float, limit: int = 500) -> list[Tick]:
        """Return the ticks of the sensor that started after a moment, oldest first, up to a limit."""
        return [tick for tick in ticks(self.address, limit=limit) if tick.at > moment]

    def runs_for(self, change: Callable[[], object]) -> list[Run]:
        """Make a change, wait until everything is up to date, and return the runs for it."""
        before = {run.id for run in self.runs()}
        change()
        self.until_up_to_date()
        return [run for run in self.runs() if run.id not in before]

    def until_training(self) -> None:
        """Wait for a training process that has loaded its model and counts its steps."""
        now = time.time()
        attempts = self.workspace / ".ft" / "attempts"
        wait_until(
            lambda: any(_modified(path) > now for path in attempts.glob("*/*/progress.json")),
            "a training is under way",
            pause=0.1,
        )

    def until_evaluating(self) -> None:
        """Wait for an evaluation process."""
        wait_until(
            lambda: any("ft_dagster.evaluation" in command_of(process) for process in self.processes()),
            "an evaluation is under way",
        )

    def asset(self, name: str) -> Asset:
        return asset(self.address, name)

    def not_fresh(self) -> set[str]:
        """Return the stages that the UI does not show as fresh."""
        return {stage.name for stage in STAGES if self.asset(stage.name).stale_status != "FRESH"}

    def made(self) -> Made:
        """Return what training and evaluation processes have left behind so far."""
        logs = {(path.name, path.stat().st_size) for path in (self.workspace / "logs").glob("*.log")}
        evaluations = {log for log in logs if log[0].startswith("evaluation-")}
        return Made(
            frozenset(path.name for path in (self.workspace / ".ft" / "store" / "lora_adapter").iterdir()),
            frozenset(log for log in logs - evaluations if log[0] != "failures.log"),
            frozenset(evaluations),
        )


class MakeDev(DagsterDev):
    """`dagster dev` started by `make dev`, with the Python of the tests in place of `.venv`."""

    def _command(self) -> list[str]:
        return ["make", "dev", f"BIN={Path(sys.executable).parent}", "READY="]

    def _interrupt(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends Ctrl-C to make and to all processes that it started


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # the training has just finished
        return 0.0
