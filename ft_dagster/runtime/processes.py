"""Run one training in several processes, through torchrun. None of them outlives the process that started them.

Imports no torch, because the process that starts them only waits.
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
"""Environment variable that names the file through which the processes of one training on one machine find each
other."""


def leave(code: int) -> NoReturn:
    """Exit from this process, one of several, without the interpreter's cleanup.

    Threads of gloo may still hold tensors, and they abort a process that cleans up before they release them
    (pytorch/pytorch#179291). A finished training would then count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run_together(module: str, request: Path, count: int, threads: int) -> int:
    """Run a module on a request in several processes on this machine, and wait for all of them.

    A signal to stop is forwarded to each process; torchrun itself would kill them after 30 s.

    Args:
        module: module that calls `die_with_parent` and joins the other processes (model/ranks.py).
        request: path of the request, which is the argument of the module.
        count: number of processes.
        threads: number of CPU threads for each process.

    Returns:
        0 if every process exited with 0; 130 if they were asked to stop before that; otherwise 1.
    """
    asked_to_stop = False
    with tempfile.TemporaryDirectory(prefix="ft-rendezvous-") as folder:
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "1", "--nproc-per-node", str(count), "--max-restarts", "0", "--local-addr", "127.0.0.1"),
            *("--signals-to-handle", "SIGHUP"),  # signals to stop are forwarded below
            # The processes find each other through files, so nothing listens on a port.
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{folder}/torchrun", "--rdzv-conf", "store_type=file"),
            *("--log-dir", f"{folder}/log"),
            *("-m", module, str(request)),
        ]
        here = {RENDEZVOUS: f"{folder}/processes", "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": _LOOPBACK}
        process = subprocess.Popen(torchrun, env=os.environ | here, preexec_fn=_torchrun_set_up(os.getpid()))

        def forward(number: int, frame: FrameType | None) -> None:
            nonlocal asked_to_stop
            asked_to_stop = True
            for worker in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            failed = process.wait() != 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return (INTERRUPTED if asked_to_stop else FAILED) if failed else 0


_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def _torchrun_set_up(parent: int) -> Callable[[], None]:
    """Return a `preexec_fn` for torchrun, which then ignores the signals to its processes and exits after them."""
    set_up_child = dying_with(parent)

    def set_up() -> None:
        set_up_child()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    return set_up
