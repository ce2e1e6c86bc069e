"""Heavy steps run in child processes, through Dagster Pipes.

Dagster's PipesSubprocessClient leaves the children of a cancelled child alive, and the child itself when its parent is
killed. Here the child leads a process group and dies with its parent. If the step ends before the child, the group gets
SIGINT, SIGTERM and SIGKILL, in that order.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import dagster as dg
from pydantic import PrivateAttr

from ft_dagster.config.redaction import child_environment
from ft_dagster.defs.runs.state import has_ended
from ft_dagster.runtime.child import LESS_MEMORY
from ft_dagster.runtime.parent import dying_with

_POLL_SECONDS = 0.25
_ASK_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0
"""How long a step whose child has exited waits for a history that does not answer."""
_TAIL = 2000
_WORKER_KILLED = re.compile(rf"exitcode\s*: {-signal.SIGKILL}\b")
"""How torchrun reports that one of several processes was killed."""


class ChildProcess(dg.ConfigurableResource):
    """Starts `python -m MODULE REQUEST` for a step and waits until it exits."""

    grace_seconds: float = 60.0
    """How long a child may take after SIGINT to save a checkpoint."""
    _running: list[subprocess.Popen[bytes]] = PrivateAttr(default_factory=list)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Stop the children of steps that were interrupted.

        If a run is cancelled while Dagster stores an observation, Dagster does not return to the generator that yielded
        it. Its `finally` block would run too late: the child, which should save a checkpoint, would be killed together
        with this process.
        """
        for process in self._running:
            self._end_group(process, context.log.info if context.log else _say_nothing)

    def run(
        self,
        context: dg.AssetExecutionContext,
        module: str,
        request: Path,
        log_path: Path,
        *,
        bucket: bool = False,
    ) -> Iterator[dg.AssetObservation]:
        """Run a module on a request file, and yield what it reports as observations.

        Args:
            context: the context of the step.
            module: a module with a `__main__` that takes the path of the request.
            request: the request, a JSON file.
            log_path: the file for the child's output, the end of which is in the error if the child fails.
            bucket: whether the child gets the keys of the bucket.

        Raises:
            Failure: the child's exit code is not 0, or the run was ended by another process.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with (
            log_path.open("ab") as output,
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesEnvContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session,
        ):
            began = output.tell()
            environment = {**child_environment(bucket=bucket), **session.get_bootstrap_env_vars()}
            process = self._start(module, request, environment, output)
            self._running.append(process)
            context.log.info(f"{module} runs as process {process.pid}; its output goes to {log_path}")
            reported = 0
            asked = time.monotonic()
            try:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    messages = session.get_custom_messages()
                    if len(messages) == reported and time.monotonic() - asked < _ASK_SECONDS:
                        continue
                    ended = _has_ended(context)
                    asked = time.monotonic()
                    if ended:
                        self._stop_at_once(process)
                    if ended is None:  # reports can wait, and so can the end of the child
                        continue
                    for message in messages[reported:]:
                        yield dg.AssetObservation(context.asset_key, metadata=_numbers(message))
                    reported = len(messages)
            finally:
                self._end_group(process, context.log.info)
                self._running.remove(process)
            asked = time.monotonic()
            while _has_ended(context) is None and time.monotonic() - asked < _PATIENCE_SECONDS:
                time.sleep(_POLL_SECONDS)
            for message in session.get_custom_messages()[reported:]:
                yield dg.AssetObservation(context.asset_key, metadata=_numbers(message))
        if process.returncode:
            said = _tail(log_path, began)
            if process.returncode == -signal.SIGKILL or _WORKER_KILLED.search(said):
                raise dg.Failure(
                    f"{module} was killed, most likely by the system because memory ran out. {LESS_MEMORY} The next "
                    f"run goes on from the last checkpoint. The end of {log_path}:\n{said}"
                )
            raise dg.Failure(f"{module} ended with exit code {process.returncode}. The end of {log_path}:\n{said}")

    def _start(
        self, module: str, request: Path, environment: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        fixed = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", module, str(request)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **fixed},
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),  # the only way to set it before the child runs
        )

    def _stop_at_once(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the child, because a machine that was disconnected must not write after another has taken over."""
        os.killpg(process.pid, signal.SIGKILL)
        raise dg.Failure("This run was ended from elsewhere, so its process stops. Another one goes on with its work.")

    def _end_group(self, process: subprocess.Popen[bytes], log: Callable[[str], None]) -> None:
        """Stop all processes of the child's group."""
        running = process.poll() is None
        for number, wait in (
            (signal.SIGINT, self.grace_seconds if running else 0.0),
            (signal.SIGTERM, 5.0 if running else 0.0),
            (signal.SIGKILL, 5.0),
        ):
            if not _alive(process):
                return
            os.killpg(process.pid, number)
            with suppress(Exception):  # the history may not answer, and the child must be stopped anyway
                log(f"sent {number.name} to process group {process.pid}")
            until = time.monotonic() + wait
            while _alive(process) and time.monotonic() < until:
                time.sleep(0.1)


def _say_nothing(_: str) -> None:
    pass


def _has_ended(context: dg.AssetExecutionContext) -> bool | None:
    """Whether the run was ended by another process; None while Dagster's history does not answer.

    A database that is being restarted does not answer. Reports have to wait then, and nothing is wrong with the child.
    """
    try:
        return has_ended(context.instance, context.run.run_id)
    except Exception:  # database clients are optional, so their exceptions cannot be imported here
        return None


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether any process of the group is alive. The child itself is reaped if it has exited."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _numbers(message: object) -> dict[str, dg.MetadataValue]:
    """Return the numbers of a message as metadata, which the UI plots."""
    content = message if isinstance(message, dict) else {}
    return {
        name: dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(float(value))
        for name, value in content.items()
        if isinstance(value, (int, float))
    }


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace").strip()[-_TAIL:]
