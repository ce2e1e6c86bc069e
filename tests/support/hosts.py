"""Hosts for tests of what runs on several machines: network namespaces that only see each other."""

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
    """One network namespace. It has the machine's files and processes, and a network of its own."""

    name: str
    address: str

    def command(self, *arguments: str | Path) -> list[str]:
        """What runs these arguments on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def cut_off(self) -> None:
        """Pull the plug of its network."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")

    def plug_in(self) -> None:
        """Put the plug back."""
        _ip("-n", self.name, "link", "set", INTERFACE, "up")

    def freeze(self, histories: Path) -> None:
        """All that runs there stands still: nobody gets an answer, and nothing is written to a disk.

        Not in the middle of a write to one of the SQLite files below `histories`: it would keep others from writing
        for as long as it is frozen, and no host that is lost can do that.
        """
        while True:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            if not any(map(_is_locked, histories.rglob("*.db"))):
                return
            self.thaw()

    def thaw(self) -> None:
        """It goes on as if no time had passed."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def processes(self) -> list[psutil.Process]:
        """All that runs there."""
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
    """Where this machine lets nobody make namespaces the test is skipped; with CI_HOSTS=required it fails."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        said = "namespaces need root, `ip` and `unshare` (Debian: apt-get install iproute2 util-linux)"
        pytest.fail(said) if os.environ.get("CI_HOSTS") == "required" else pytest.skip(said)


@contextmanager
def hosts(count: int = 2) -> Iterator[Sequence[Host]]:
    """Hosts on one network (10.77.0.0/24 between them), gone afterwards with all that runs there.

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
