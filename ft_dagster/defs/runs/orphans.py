"""Servers that keep running after their `dagster dev` was killed.

The code server notices that within a minute or two and exits. The web server and the daemon do not: Dagster 1.13 stops
them by a message through a pipe, and they do not notice when the pipe is closed. The daemon would keep running beside
the next one, which Dagster does not support.
"""

import os
from contextlib import suppress

import psutil

_SERVERS = {"dagster._daemon", "dagster_webserver"}
_PIPE = "--shutdown-pipe"
"""An option that only `dagster dev` passes to the servers it starts."""
_PATIENCE_SECONDS = 20.0


def end_orphans(home: str) -> list[int]:
    """Stop the servers on a DAGSTER_HOME whose `dagster dev` is gone; kill those that do not stop in time.

    Returns:
        The ids of the processes that were stopped.
    """
    left = [process for process in psutil.process_iter() if _is_orphan(process, home)]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=_PATIENCE_SECONDS)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=_PATIENCE_SECONDS)
    return [process.pid for process in left]


def _is_orphan(process: psutil.Process, home: str) -> bool:
    try:
        command = process.cmdline()
        if _PIPE not in command or not _SERVERS & set(command):
            return False
        if os.path.realpath(process.environ().get("DAGSTER_HOME", "")) != os.path.realpath(home):
            return False
        parent = process.parent()
        return parent is None or "dev" not in parent.cmdline()
    except psutil.Error:  # the process has exited, or belongs to another user
        return False
