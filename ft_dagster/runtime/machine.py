"""What this machine offers a training, according to the operating system. Imports no torch and touches no GPU."""

import math
import os
import platform
import shutil
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def has_gpu() -> bool:
    """Whether a training is likely to run on a GPU: the driver is installed and no GPU is hidden. Only torch knows."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return shutil.which("nvidia-smi") is not None and not hidden


def processor() -> str:
    """Return the processor's model and number of threads. Together with the recipe, they decide the speed on a CPU."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} threads"


def instructions() -> list[str]:
    """Return the processor's instruction sets, which may differ between virtual machines with the same model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []  # not Linux; there, the model's name determines them
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flags.split())


def cores() -> int:
    """Return the processor cores that this process can use, within the limits of its affinity and control groups."""
    found = [psutil.cpu_count(logical=False) or os.cpu_count() or 1, *filter(None, map(_cores_in, _cgroups()))]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    return min(found)


def _cores_in(folder: Path) -> int | None:
    """Return the cores that a control group allows, rounded up; None if it has no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or the quota is the word `max`
        return None


def memory_for_process() -> int:
    """Return the bytes of memory that this process can use in total, including what it uses already, without swap."""
    here = psutil.Process().memory_info().rss
    limits = [psutil.virtual_memory().available, *(_available_in(folder) for folder in _cgroups())]
    return here + min(limit for limit in limits if limit is not None)


def _cgroups() -> list[Path]:
    """Return the folders of the control groups that this process is in, from its own upwards; versions 1 and 2."""
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


def _available_in(folder: Path) -> int | None:
    """Return the bytes that a control group can still use; None if it has no limit.

    Cached files do not count as used, because the kernel frees their memory when it is needed.
    """
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or the limit is the word `max`
            continue
        return most - now + int(cached.get("inactive_file", 0))
    return None
