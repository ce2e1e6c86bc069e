"""Devices for one process: it takes as many as it needs, sees those, and nobody else takes them. Imports no torch.

A lease is a file lock, so it ends with the process, however that ends. It counts across runs, workspaces and
terminals of a machine; the pool `gpu` of an instance only keeps runs from being started to wait.
"""

import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ft_dagster.errors import UserError

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.25
_LISTED = re.compile(
    r"^(?P<inside> *)(?:GPU \d+: (?P<gpu>.*)|(?P<part>MIG \S+).*)\(UUID: (?P<uuid>(?:GPU|MIG)-[\w/-]+)\)", re.MULTILINE
)


class LeaseError(UserError):
    """There are not as many devices as were asked for."""


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU."""

    name: str
    """Of its lock: the same for every process of the machine."""
    visible: str | None
    """How CUDA_VISIBLE_DEVICES names it to this process; None for the CPU."""
    model: str | None = None
    """Such as `NVIDIA H100 80GB HBM3`, or `MIG 3g.20gb` for a part of one; None for the CPU."""


_MACHINE = socket.gethostname()
CPU = Device(f"cpu-{_MACHINE}", None)
"""Holds the name of this machine: others may share the folder of locks. Names of GPUs are unique anyway."""


def visible_devices() -> list[Device]:
    """The GPUs that this process may use, in its order; the CPU where there is none.

    What CUDA_VISIBLE_DEVICES lists (an outer scheduler's choice) is only ever narrowed.
    """
    models = _models()
    uuids = list(models)
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return [Device(uuid, uuid, model) for uuid, model in models.items()] or [CPU]
    found = []
    for word in (word.strip() for word in chosen.split(",")):
        if (name := _named(word, uuids)) is None:
            break  # as CUDA reads it: what comes after a name that it does not know is not seen
        found.append(Device(name, word, models[name]))
    return found or [CPU]


def _models() -> dict[str, str]:
    """UUID -> model of GPUs; of their parts where one is divided (MIG), since only those can be used then."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    if listed.returncode:
        log.warning("nvidia-smi -L failed, so no GPU is used: %s", (listed.stderr or listed.stdout).strip())
        return {}
    found: dict[str, str] = {}
    for match in _LISTED.finditer(listed.stdout):
        if match["inside"] and found and next(reversed(found)).startswith("GPU-"):
            found.popitem()  # the GPU that it is a part of
        found[match["uuid"]] = (match["gpu"] or match["part"]).strip()
    return found


def _named(word: str, uuids: Sequence[str]) -> str | None:
    if word.isdecimal():
        return uuids[int(word)] if int(word) < len(uuids) else None
    return next((uuid for uuid in uuids if word and uuid.startswith(word)), None)


@contextmanager
def leased(locks: Path, count: int = 1) -> Iterator[list[Device]]:
    """Hold as many devices; other processes do not get them, and this one and its children see no others.

    Whoever waits first is served first, and takes devices as they become free, so that one who needs many is not
    passed by those who need one.

    Args:
        locks: folder of the locks, the same for all processes of the machine.
        count: GPUs; on a CPU one lease is all there is.

    Raises:
        LeaseError: this process can see fewer.
    """
    devices = visible_devices()
    needed = 1 if devices == [CPU] else count
    if needed > len(devices):
        raise LeaseError(
            f"The recipe asks for {count} GPUs (training.processes), and {len(devices)} can be seen here. Lower "
            f"training.processes, or run where there are more ({VISIBLE} is {os.environ.get(VISIBLE, 'not set')})."
        )
    locks.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _in_turn(locks):
            taken = _take(devices, needed, locks, held)
        if taken != [CPU]:
            os.environ[VISIBLE] = ",".join(str(device.visible) for device in taken)
        log.info("Computing on %s", ", ".join(device.name for device in taken))
        yield taken


@contextmanager
def _in_turn(locks: Path) -> Iterator[None]:
    turn = FileLock(locks / f"turn-{_MACHINE}.lock")
    try:
        turn.acquire(timeout=0)
    except Timeout:
        log.warning("Others wait for a device; waiting for our turn.")
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


def _take(devices: Sequence[Device], needed: int, locks: Path, held: ExitStack) -> list[Device]:
    taken: list[Device] = []
    told = False
    while True:
        for device in devices:
            if len(taken) < needed and device not in taken and _taken(locks / f"{device.name}.lock", held):
                taken.append(device)
        if len(taken) == needed:
            return [device for device in devices if device in taken]
        if not told:
            names = ", ".join(device.name for device in devices)
            log.warning("Another training or evaluation holds %s; waiting for it to end.", names)
            told = True
        time.sleep(_POLL_SECONDS)


def _taken(path: Path, held: ExitStack) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    held.callback(lock.release)
    return True
