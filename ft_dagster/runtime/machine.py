"""What this machine has for a training, as the operating system says it. Imports no torch, touches no GPU."""

import math
import os
import platform
import shutil
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def has_gpu() -> bool:
    """Whether a training is likely to run on a GPU: its driver is here, and none is hidden. Only torch knows."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return shutil.which("nvidia-smi") is not None and not hidden


def processor() -> str:
    """The processor's model and how many threads it runs: with the recipe, what decides speed on a CPU."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} threads"


def instructions() -> list[str]:
    """The processor's instruction sets. Virtual machines of one model name may have different ones."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []  # not Linux: there the model's name says it
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flags.split())


def cores() -> int:
    """Processor cores that a process gets: those there are, less what its affinity or a control group withholds."""
    found = [psutil.cpu_count(logical=False) or os.cpu_count() or 1, *filter(None, map(_cores_in, _cgroups()))]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    return min(found)


def _cores_in(folder: Path) -> int | None:
    """What a control group allows, rounded up; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or the quota is the word `max`
        return None


def memory_for_process() -> int:
    """Bytes that this process could take in all, what it has already included; swap does not count."""
    here = psutil.Process().memory_info().rss
    rooms = [psutil.virtual_memory().available, *(_room_in(folder) for folder in _cgroups())]
    return here + min(room for room in rooms if room is not None)


def _cgroups() -> list[Path]:
    """Folders of the control groups this process is in, from its own up; version 1 and 2."""
    folders = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                own = _CGROUPS / controllers / path.lstrip("/")
                folders += [own, *(up for up in own.parents if up.is_relative_to(_CGROUPS / controllers))]
    except (OSError, ValueError):
        pass  # not Linux
    return folders


def _room_in(folder: Path) -> int | None:
    """What a control group may still take; None without a limit. Cached files give way, so they do not count."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or the limit is the word `max`
            continue
        return most - now + int(cached.get("inactive_file", 0))
    return None
