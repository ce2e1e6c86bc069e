"""Helpers for processes that a test starts: their ports and their termination."""

import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def free_port() -> int:
    """Return a port of loopback that no process listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def accept_ctrl_c() -> None:
    """For `preexec_fn`: a test run in the background ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def inheriting(variable: str, value: str) -> list[psutil.Process]:
    """Return every living process with this value in its environment, whatever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_of(process: psutil.Process) -> list[str]:
    """Return the words of its command; none if it has exited since it was found."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@contextmanager
def suspended(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Suspend these processes during the block, so that short work cannot finish before a test has acted."""
    stopped = list(processes)
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def is_asked_to_stop(process: psutil.Process) -> bool:
    """Return whether SIGINT is pending for a suspended process, or the process has exited."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return bool(pending & 1 << signal.SIGINT - 1)


def end_inheriting(variable: str, value: str) -> None:
    """Kill all of these processes, and those that they start meanwhile."""
    while left := inheriting(variable, value):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
