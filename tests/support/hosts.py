"""Hosts for tests with several machines: network namespaces that only see each other."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

INTERFACE = "net0"
"""The name of each host's interface."""


@dataclass(frozen=True)
class Host:
    """A network namespace with the machine's files and processes and a network of its own."""

    name: str
    address: str

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command that runs these arguments on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def cut_off(self) -> None:
        """Disconnect its network."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")

    def plug_in(self) -> None:
        """Reconnect its network."""
        _ip("-n", self.name, "link", "set", INTERFACE, "up")

    def freeze(self, histories: Path) -> None:
        """Stop all processes there: none answers, and nothing is written to a disk.

        They are not stopped while they write to a SQLite file below `histories`, which would block other writers
        while they are frozen, as a host that is really lost cannot.
        """
        while True:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            if not any(map(_is_locked, histories.rglob("*.db"))):
                return
            self.thaw()

    def thaw(self) -> None:
        """Let the processes continue as if no time had passed."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def processes(self) -> list[psutil.Process]:
        """Return all processes that run there."""
        found = []
        for number in subprocess.check_output(["ip", "netns", "pids", self.name], text=True).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(number)))
        return found


def _is_locked(database: Path) -> bool:
    with closing(sqlite3.connect(database, timeout=0.2)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        except sqlite3.OperationalError:
            return True
    return False


def require_namespaces() -> None:
    """Skip the test if this machine does not allow namespaces; with CI_HOSTS=required, fail."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        said = "namespaces need root, `ip` and `unshare` (Debian: apt-get install iproute2 util-linux)"
        pytest.fail(said) if os.environ.get("CI_HOSTS") == "required" else pytest.skip(said)


@contextmanager
def hosts(count: int = 2) -> Iterator[Sequence[Host]]:
    """Make hosts on one network (10.77.0.0/24), which are removed afterwards with all of their processes.

    See `require_namespaces`.
    """
    require_namespaces()
    mark = f"ft{os.getpid()}"
    switch = f"{mark}-switch"
    made = [Host(f"{mark}-{number}", f"10.77.0.{number}") for number in range(1, count + 1)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(made, start=1):
            _ip("netns", "add", host.name)
            _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", INTERFACE, "netns", host.name)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield made
    finally:
        for host in made:
            with suppress(subprocess.CalledProcessError):
                _end(host)
        for name in (*(host.name for host in made), switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _end(host: Host) -> None:
    while left := host.processes():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
