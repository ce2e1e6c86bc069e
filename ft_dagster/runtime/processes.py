"""Several processes for one training, through torchrun; none of them outlives the one that started them.

Imports no torch: the process that starts them only waits.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ft_dagster.runtime.child import FAILED, INTERRUPTED
from ft_dagster.runtime.parent import dying_with

RENDEZVOUS = "FT_RENDEZVOUS"
"""Variable of the environment: the file through which the processes of one training on one machine find each other."""


def leave(code: int) -> NoReturn:
    """End this process, one of several, without the interpreter's tidying up.

    Threads of gloo may still hold tensors, and abort a process that tidies up around them
    (pytorch/pytorch#179291): a training that is done would count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run_together(module: str, request: Path, count: int, threads: int) -> int:
    """Run a module on a request in several processes on this machine, and wait for all of them.

    A signal to stop is handed on to each of them; torchrun itself would give them 30 s to end.

    Args:
        module: one that calls `die_with_parent` and joins the others (model/ranks.py).
        request: its argument.
        count: of processes.
        threads: of the CPU for each of them.

    Returns:
        0 if each of them ended with 0; 130 if they were asked to stop before that; else 1.
    """
    asked_to_stop = False
    with tempfile.TemporaryDirectory(prefix="ft-rendezvous-") as folder:
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "1", "--nproc-per-node", str(count), "--max-restarts", "0", "--local-addr", "127.0.0.1"),
            *("--signals-to-handle", "SIGHUP"),  # those that ask to stop are handed on here
            # The processes find each other through files: nothing listens on a port.
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{folder}/torchrun", "--rdzv-conf", "store_type=file"),
            *("--log-dir", f"{folder}/log"),
            *("-m", module, str(request)),
        ]
        here = {RENDEZVOUS: f"{folder}/processes", "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": _LOOPBACK}
        process = subprocess.Popen(torchrun, env=os.environ | here, preexec_fn=_agent_of(os.getpid()))

        def hand_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked_to_stop
            asked_to_stop = True
            for worker in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            failed = process.wait() != 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return (INTERRUPTED if asked_to_stop else FAILED) if failed else 0


_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def _agent_of(parent: int) -> Callable[[], None]:
    """torchrun ignores the signals that end its processes, and ends when they have ended."""
    heed = dying_with(parent)

    def set_up() -> None:
        heed()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    return set_up
