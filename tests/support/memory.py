"""Runs processes with little memory, in a control group as in a container."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from dagster_dev import wait_until

_GROUPS = Path("/sys/fs/cgroup")
_FIRST, _SECOND = ("memory/{}", "memory.limit_in_bytes"), ("{}", "memory.max")
"""Versions 1 and 2 of control groups: where a group is made, and the file with its limit."""


@dataclass(frozen=True)
class Container:
    """A control group with a limit on its memory."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs these arguments in it."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *arguments]

    def processes(self) -> list[psutil.Process]:
        found = []
        for line in (self.folder / "cgroup.procs").read_text().split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(line)))
        return found


@contextmanager
def container(gibibytes: float) -> Iterator[Container]:
    """Make a control group with this much memory during the block; processes left in it are killed.

    The test is skipped if none can be made.
    """
    made = next(filter(None, (_make(place, limit, int(gibibytes * 2**30)) for place, limit in (_FIRST, _SECOND))), None)
    if made is None:
        pytest.skip(
            "no control group for memory can be made here: that takes root, and files of the kernel to write to"
        )
    try:
        yield made
    finally:
        for process in made.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not made.processes(), "no process is left in it")
        made.folder.rmdir()


def _make(place: str, limit: str, size: int) -> Container | None:
    folder = _GROUPS / place.format(f"ft-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir()
        (folder / limit).write_text(str(size))
    except OSError:
        if folder.is_dir():
            folder.rmdir()
        return None
    return Container(folder)


def use_up(container: Container, killed: psutil.Process) -> None:
    """Use up the memory of a container until the system kills a process in it, which is this one."""
    Path(f"/proc/{killed.pid}/oom_score_adj").write_text("1000")
    subprocess.run(container.command(sys.executable, "-c", _USE_UP, str(killed.pid)), stderr=subprocess.DEVNULL)


_USE_UP = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("-1000")
taken = []  # slowly: once that process is gone no other may have to go
while open(f"/proc/{sys.argv[1]}/statm").read() != "0 0 0 0 0 0 0\\n":
    taken.append(b"x" * 2**22)
    time.sleep(0.005)
"""
