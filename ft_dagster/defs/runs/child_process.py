"""Heavy steps run in a process of their own, through Dagster Pipes.

The stock subprocess client leaves the children of a cancelled child alive, and a child alive when its own parent
is killed. Here the child leads a process group, dies with its parent, and its group is signalled SIGINT, SIGTERM,
SIGKILL, in that order, whenever the step ends without it.
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
"""How long a child that has ended waits for a history that does not answer."""
_TAIL = 2000
_WORKER_KILLED = re.compile(rf"exitcode\s*: {-signal.SIGKILL}\b")
"""How torchrun says that one of several processes was killed."""


class ChildProcess(dg.ConfigurableResource):
    """Starts `python -m MODULE REQUEST` for a step and follows it to its end."""

    grace_seconds: float = 60.0
    """How long a child may take after SIGINT to save a checkpoint."""
    _running: list[subprocess.Popen[bytes]] = PrivateAttr(default_factory=list)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """End the children of steps that were cut off.

        A run that is cancelled while Dagster stores an observation does not come back to the generator that gave it:
        what is in a `finally` there comes too late, when the process that would save a checkpoint is killed with this.
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
        """Run a module on a request file; what it reports while it runs comes out as observations.

        Args:
            context: of the step.
            module: with a `__main__` that takes the request's path.
            request: a JSON file.
            log_path: takes the child's output; the end of it goes into the error if the child fails.
            bucket: whether the child is given the keys of the bucket.

        Raises:
            Failure: the child ended with another exit code than 0, or the run was ended from elsewhere.
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
            told = 0
            asked = time.monotonic()
            try:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    messages = session.get_custom_messages()
                    if len(messages) == told and time.monotonic() - asked < _ASK_SECONDS:
                        continue
                    ended = _has_ended(context)
                    asked = time.monotonic()
                    if ended:
                        self._stop_at_once(process)
                    if ended is None:  # what there is to tell can wait, and so can the child's end
                        continue
                    for message in messages[told:]:
                        yield dg.AssetObservation(context.asset_key, metadata=_numbers(message))
                    told = len(messages)
            finally:
                self._end_group(process, context.log.info)
                self._running.remove(process)
            asked = time.monotonic()
            while _has_ended(context) is None and time.monotonic() - asked < _PATIENCE_SECONDS:
                time.sleep(_POLL_SECONDS)
            for message in session.get_custom_messages()[told:]:
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
        """A machine that was cut off and comes back must write nothing where another has taken over."""
        os.killpg(process.pid, signal.SIGKILL)
        raise dg.Failure("This run was ended from elsewhere, so its process stops. Another one goes on with its work.")

    def _end_group(self, process: subprocess.Popen[bytes], log: Callable[[str], None]) -> None:
        """Leave no process of the child's group behind."""
        running = process.poll() is None
        for number, wait in (
            (signal.SIGINT, self.grace_seconds if running else 0.0),
            (signal.SIGTERM, 5.0 if running else 0.0),
            (signal.SIGKILL, 5.0),
        ):
            if not _alive(process):
                return
            os.killpg(process.pid, number)
            with suppress(Exception):  # the history may be away, and the child must end all the same
                log(f"sent {number.name} to process group {process.pid}")
            until = time.monotonic() + wait
            while _alive(process) and time.monotonic() < until:
                time.sleep(0.1)


def _say_nothing(_: str) -> None:
    pass


def _has_ended(context: dg.AssetExecutionContext) -> bool | None:
    """Whether the run was ended from elsewhere; None while Dagster's history does not answer, such as a database that
    is started again. Nothing can be told to it then, and nothing is wrong with the child."""
    try:
        return has_ended(context.instance, context.run.run_id)
    except Exception:  # the clients of databases are not installed everywhere, so their errors have no names here
        return None


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether any process of the group is left. The child itself is reaped on the way."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _numbers(message: object) -> dict[str, dg.MetadataValue]:
    """Metadata that the UI plots: the numbers of a message."""
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
