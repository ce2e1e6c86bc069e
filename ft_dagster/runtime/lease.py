"""Leases of devices: a process leases as many as it needs, sees only those, and keeps other processes from using them.

A lease is a file lock, so it is released when the process ends, for whatever reason. It is valid across all runs,
workspaces and terminals of a machine; the pool `gpu` of a Dagster instance only avoids starting runs that would wait.
Imports no torch.
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
_GPU_LINE = re.compile(
    r"^(?P<inside> *)(?:GPU \d+: (?P<gpu>.*)|(?P<part>MIG \S+).*)\(UUID: (?P<uuid>(?:GPU|MIG)-[\w/-]+)\)", re.MULTILINE
)


class LeaseError(UserError):
    """Fewer devices are visible than were asked for."""


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU."""

    name: str
    """Name of the device's lock, which is the same for every process of the machine."""
    visible: str | None
    """The name of the device in CUDA_VISIBLE_DEVICES of this process; None for the CPU."""
    model: str | None = None
    """The model, such as `NVIDIA H100 80GB HBM3`, or `MIG 3g.20gb` for a part of a GPU; None for the CPU."""


_MACHINE = socket.gethostname()
CPU = Device(f"cpu-{_MACHINE}", None)
"""The CPU. Its name contains that of the machine, because other machines may share the folder of locks. The names of
GPUs are unique anyway."""


def visible_devices() -> list[Device]:
    """Return the GPUs that this process may use, in the order in which it sees them, or the CPU if there are none.

    The list in CUDA_VISIBLE_DEVICES (the choice of an outer scheduler) is only ever narrowed.
    """
    models = _models()
    uuids = list(models)
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return [Device(uuid, uuid, model) for uuid, model in models.items()] or [CPU]
    found = []
    for word in (word.strip() for word in chosen.split(",")):
        if (name := _named(word, uuids)) is None:
            break  # as in CUDA, no device after an unknown name is visible
        found.append(Device(name, word, models[name]))
    return found or [CPU]


def _models() -> dict[str, str]:
    """Return UUID -> model of each GPU. A divided GPU (MIG) is replaced by its parts, since only they can be used."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    if listed.returncode:
        log.warning("nvidia-smi -L failed, so no GPU is used: %s", (listed.stderr or listed.stdout).strip())
        return {}
    found: dict[str, str] = {}
    for match in _GPU_LINE.finditer(listed.stdout):
        if match["inside"] and found and next(reversed(found)).startswith("GPU-"):
            found.popitem()  # the GPU that contains this part
        found[match["uuid"]] = (match["gpu"] or match["part"]).strip()
    return found


def _named(word: str, uuids: Sequence[str]) -> str | None:
    if word.isdecimal():
        return uuids[int(word)] if int(word) < len(uuids) else None
    return next((uuid for uuid in uuids if word and uuid.startswith(word)), None)


@contextmanager
def leased(locks: Path, count: int = 1) -> Iterator[list[Device]]:
    """Lease devices. Other processes do not get them, and this process and its children see no other devices.

    The process that waits first is served first, and leases devices as they become free, so that a process that needs
    many devices is not overtaken by others that need one.

    Args:
        locks: folder of the locks, the same for all processes of the machine.
        count: number of GPUs; on a CPU there is only one lease.

    Raises:
        LeaseError: fewer GPUs are visible to this process.
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
        log.warning("Other processes are waiting for a device; waiting for our turn.")
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


def _take(devices: Sequence[Device], needed: int, locks: Path, held: ExitStack) -> list[Device]:
    taken: list[Device] = []
    logged = False
    while True:
        for device in devices:
            if len(taken) < needed and device not in taken and _try_lock(locks / f"{device.name}.lock", held):
                taken.append(device)
        if len(taken) == needed:
            return [device for device in devices if device in taken]
        if not logged:
            names = ", ".join(device.name for device in devices)
            log.warning("Another training or evaluation is using %s; waiting for it to finish.", names)
            logged = True
        time.sleep(_POLL_SECONDS)


def _try_lock(path: Path, held: ExitStack) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    held.callback(lock.release)
    return True
