"""Make a virtual environment that holds exactly what the locks name: `python deploy/environment.py .venv`.

One line a stage says what is done, with progress on a terminal and now and then elsewhere. What the commands write is
shown only if one of them fails; the exit code is then its own. Needs nothing but Python, of any version: the first
thing it does is to refuse an unfit one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LOCK, TORCH_LOCK = "requirements.lock", "requirements-torch.lock"
_COMPILE = """
import compileall, re, sysconfig
needless = re.compile("/(tests?|transformers/models|kubernetes/aio|moto|ray/rllib|sklearn|torch/testing)/")
compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0, rx=needless)
"""
"""On all cores, and without what nobody or next to nobody imports: Python compiles that when it is imported. What is no
valid Python is left out."""
_PIPS = 4
_LOOK_SECONDS = 0.2
_PLAIN_EVERY = 100
"""Packages between two lines, where there is no terminal."""


def make_environment(folder: Path) -> None:
    """Make or complete the environment in a folder. Ends the process if a command fails."""
    version = ".".join(map(str, sys.version_info[:3]))
    run(f"Environment: {folder}, Python {version}", [sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    install = [*pip, "install", "--progress-bar", "off", "--no-deps", "--no-compile"]  # pip compiles on one core
    fetched = folder / "torch"
    (torch,) = re.findall(r"^torch==[0-9.]+", (PROJECT / TORCH_LOCK).read_text("utf-8"), re.MULTILINE)
    # Of a version with several builds pip would take PyPI's, even where an index has a CPU build: hashes come first.
    download = [*pip, "download", "--progress-bar", "off", "--no-deps", "--dest", str(fetched), torch]
    run(f"PyTorch: fetching {torch.replace('==', ' ')}", download)
    from_there = ["--no-index", "--find-links", str(fetched)]
    run("PyTorch: installing it", [*install, "--require-hashes", *from_there, "--requirement", TORCH_LOCK])
    shutil.rmtree(fetched)
    lock = (PROJECT / LOCK).read_text("utf-8")
    count = len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE))
    with shares(lock, folder / "shares") as files:
        commands = [[*install, "--require-hashes", "--requirement", str(file)] for file in files]
        compiling_torch = [python, "-c", _COMPILE]  # while they wait
        run(f"Packages: up to {count} of {LOCK}", *commands, compiling_torch, progress=Installed(folder, count))
    run("ft_dagster: this folder", [*install, "--no-build-isolation", "--editable", "."])
    # PyPI's torch for Linux asks for NVIDIA's libraries, gigabytes that the lock does not name; a CPU build, for none.
    run("PyTorch: libraries that its build needs", [*pip, "install", "--progress-bar", "off", torch.partition("=")[0]])
    run("Packages: compiling them", [python, "-c", _COMPILE])


@contextmanager
def shares(lock: str, folder: Path) -> Iterator[list[Path]]:
    """A lock divided into files for several pips: each waits for the index most of its time, and needs one core."""
    entries = re.findall(r"^[\w.-]+==(?:.*\\\n)*.*\n", lock, re.MULTILINE)
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.txt" for number in range(min(_PIPS, len(entries)))]
    for number, file in enumerate(files):
        file.write_text("".join(entries[number::_PIPS]), "utf-8")
    try:
        yield files
    finally:
        shutil.rmtree(folder)


def downloading(lines: list[str]) -> tuple[int, str]:
    """What pip fetches, and how large that is: the last one that it named."""
    named = list(filter(None, (re.match(r"\s*Downloading ([^\s-]+)\S*( \(.*\))?", line) for line in lines)))
    return len(named), f"{named[-1][1].rpartition('/')[2]}{named[-1][2] or ''}" if named else ""


class Installed:
    """How far an installation of many packages is, from what pip writes and from what is there."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        self._before = self._present()

    def __call__(self, lines: list[str]) -> tuple[int, str]:
        """Packages done so far, installed ones counted again, and how to say it."""
        count = self._count - _beginning("Ignoring ", lines)
        there = _beginning("Requirement already satisfied", lines)
        fetched = _beginning("Collecting ", lines) + there
        installed = self._present() - self._before
        if installed > 0:
            return fetched + installed, f"{min(there + installed, count)} of {count} installed"
        return fetched, f"{fetched} of {count} fetched"

    def _present(self) -> int:
        return len(list(self._folder.glob("lib/python*/site-packages/*.dist-info")))


def run(stage: str, *commands: list[str], progress: Callable[[list[str]], tuple[int, str]] = downloading) -> None:
    """Run commands at once and keep back what they write, unless one fails: then show that, and exit as it did.

    Args:
        progress: from the lines written so far, how many packages are done, and how to say it.
    """
    began, told = time.monotonic(), 0
    terminal = sys.stdout.isatty()
    say(stage, end="" if terminal else "\n")
    running = [Running(command) for command in commands]
    while alive := [one for one in running if one.reader.is_alive()]:
        alive[0].reader.join(_LOOK_SECONDS)
        done, said = progress([line for one in running for line in one.lines()])
        if terminal:
            seconds = int(time.monotonic() - began)
            say("\r\033[K" + ", ".join(filter(None, (stage, said, f"{seconds // 60}:{seconds % 60:02}"))), end="")
        elif done // _PLAIN_EVERY > told and any(one.reader.is_alive() for one in running):
            told = done // _PLAIN_EVERY
            say(f"  {said}")
    if terminal:
        say("")
    for one in running:
        if code := one.process.wait():
            say(f"{stage}: failed. This was written by {' '.join(one.command)}:", end="\n\n")
            say("\n".join(one.lines()))
            sys.exit(code if code > 0 else 128 - code)


class Running:
    """A command, and what it has written."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._written: list[bytes] = []
        self.reader = threading.Thread(target=lambda: self._written.extend(self.process.stdout or ()))
        self.reader.start()

    def lines(self) -> list[str]:
        return [line.decode("utf-8", "replace").rstrip() for line in list(self._written)]


def say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def _beginning(start: str, lines: list[str]) -> int:
    return sum(line.startswith(start) for line in lines)


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info < (3, 14):
        sys.exit("Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.11 ...")
    try:
        make_environment(Path(sys.argv[1]))
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
