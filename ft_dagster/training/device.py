"""The device a process computes on, and the lock that lets one process at a time do so."""

import logging
from pathlib import Path

import torch
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def device() -> torch.device:
    """The device this process computes on: its first visible GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def one_process_a_device(locks: Path) -> FileLock:
    """A lock that the process holds while it computes on its device; it goes with the process, however that ends."""
    name = f"cuda-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else "cpu"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Another training or evaluation holds the device %s; waiting for it to end.", name)
        lock.acquire()
    return lock
