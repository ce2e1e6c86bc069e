"""Make a virtual environment with exactly the packages that the locks name: `python deploy/environment.py .venv`.

Each stage prints a line, with progress that is updated on a terminal and printed from time to time elsewhere. The
output of a command is shown only if it fails; the exit code is then that of the command. The script needs nothing but
Python, of any version: it first checks whether the version is supported.
"""

from __future__ import annotations

import os
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
"""A script that compiles the installed packages on all cores. It skips modules that are rarely or never imported, which
Python compiles on import, and files that are not valid Python."""
_PIPS = 4
_LOOK_SECONDS = 0.2
_PLAIN_EVERY = 100
"""The number of packages between two lines of progress, if the output is not a terminal."""


def make_environment(folder: Path) -> None:
    """Make or complete the environment in a folder. Exit the process if a command fails."""
    version = ".".join(map(str, sys.version_info[:3]))
    run(f"Environment: {folder}, Python {version}", [sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    install = [*pip, "install", "--progress-bar", "off", "--no-deps", "--no-compile"]  # pip compiles on one core
    fetched = folder / "torch"
    (torch,) = re.findall(r"^torch==[0-9.]+", (PROJECT / TORCH_LOCK).read_text("utf-8"), re.MULTILINE)
    # Downloaded first: with hashes, pip would prefer PyPI's build to an index's CPU build of the same version.
    download = [*pip, "download", "--progress-bar", "off", "--no-deps", "--dest", str(fetched), torch]
    run(f"PyTorch: fetching {torch.replace('==', ' ')}", download)
    local = ["--no-index", "--find-links", str(fetched)]
    run("PyTorch: installing it", [*install, "--require-hashes", *local, "--requirement", TORCH_LOCK])
    shutil.rmtree(fetched)
    wheels, there = folder / "wheels", installed(folder)
    entries = [entry for name, entry in locked((PROJECT / LOCK).read_text("utf-8")) if name not in there]
    fetch = [*pip, "wheel", "--progress-bar", "off", "--no-deps", "--require-hashes", "--wheel-dir", str(wheels)]
    with removed_afterwards(wheels), shares(entries, folder / "shares") as files:
        commands = [[*fetch, "--requirement", str(file)] for file in files]
        run(f"Packages: fetching up to {len(entries)} of {LOCK}", *commands, progress=collecting)
        # pip has compared all hashes; uv unpacks on all cores.
        if any(wheels.glob("uv-*.whl")):
            run("Packages: uv, which installs the others", [*install, "--no-index", "--find-links", str(wheels), "uv"])
        unpack = [str(folder / "bin" / "uv"), "pip", "install", "--python", python, "--no-config", "--offline"]
        unpack += ["--no-index", "--find-links", str(wheels), "--cache-dir", str(wheels / "cache"), "--no-deps"]
        unpack += ["--no-verify-hashes", *(part for file in files for part in ("--requirement", str(file)))]
        if files:
            run("Packages: installing them", unpack, progress=lambda _: installing(folder, there))
    run("ft_dagster: this folder", [*install, "--no-build-isolation", "--editable", "."])
    # PyPI's torch for Linux needs NVIDIA's libraries, gigabytes that the lock does not name; a CPU build needs none.
    run("PyTorch: libraries that its build needs", [*pip, "install", "--progress-bar", "off", torch.partition("=")[0]])
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):  # otherwise Python keeps what it compiles at the first import
        run("Packages: compiling them", [python, "-c", _COMPILE])


def locked(lock: str) -> list[tuple[str, str]]:
    """Return the packages of a lock, each as `name-version` in normal form and as its lines."""
    entries = re.finditer(r"^([\w.-]+)==([^\s;]+)(?:.*\\\n)*.*\n", lock, re.MULTILINE)
    return [(normal(f"{entry[1]}-{entry[2]}"), entry[0]) for entry in entries]


def installed(folder: Path) -> set[str]:
    """Return the packages in an environment, as `name-version` in normal form."""
    return {normal(path.stem) for path in folder.glob("lib/python*/site-packages/*.dist-info")}


def normal(name: str) -> str:
    """Return a name as PEP 503 normalizes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[None]:
    """Create a folder, and remove it at the end."""
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)


@contextmanager
def shares(entries: list[str], folder: Path) -> Iterator[list[Path]]:
    """Divide the entries of a lock into files for several pips, each of which mostly waits for the index."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.txt" for number in range(min(_PIPS, len(entries)))]
    for number, file in enumerate(files):
        file.write_text("".join(entries[number::_PIPS]), "utf-8")
    try:
        yield files
    finally:
        shutil.rmtree(folder)


def downloading(lines: list[str]) -> tuple[int, str]:
    """Return how many packages pip has downloaded, and the name and size of the last one."""
    named = list(filter(None, (re.match(r"\s*Downloading ([^\s-]+)\S*( \(.*\))?", line) for line in lines)))
    return len(named), f"{named[-1][1].rpartition('/')[2]}{named[-1][2] or ''}" if named else ""


def collecting(lines: list[str]) -> tuple[int, str]:
    """Return how many packages pip has started to fetch, as a number and as text."""
    count = sum(line.startswith(("Collecting ", "Processing ")) for line in lines)
    return count, f"{count} fetched"


def installing(folder: Path, before: set[str]) -> tuple[int, str]:
    """Return how many packages an environment has that it did not have before, as a number and as text."""
    count = len(installed(folder) - before)
    return count, f"{count} installed"


def run(stage: str, *commands: list[str], progress: Callable[[list[str]], tuple[int, str]] = downloading) -> None:
    """Run commands in parallel without showing their output. If one fails, show its output and exit with its code.

    Args:
        stage: the name of the stage, which is printed.
        commands: the commands with their arguments.
        progress: returns the number of packages done and the progress as text, from the lines written so far.
    """
    began, reported = time.monotonic(), 0
    terminal = sys.stdout.isatty()
    say(stage, end="" if terminal else "\n")
    running = [Running(command) for command in commands]
    while alive := [one for one in running if one.reader.is_alive()]:
        alive[0].reader.join(_LOOK_SECONDS)
        done, said = progress([line for one in running for line in one.lines()])
        if terminal:
            seconds = int(time.monotonic() - began)
            say("\r\033[K" + ", ".join(filter(None, (stage, said, f"{seconds // 60}:{seconds % 60:02}"))), end="")
        elif done // _PLAIN_EVERY > reported and any(one.reader.is_alive() for one in running):
            reported = done // _PLAIN_EVERY
            say(f"  {said}")
    if terminal:
        say("")
    for one in running:
        if code := one.process.wait():
            say(f"{stage}: failed. This is the output of {' '.join(one.command)}:", end="\n\n")
            say("\n".join(one.lines()))
            sys.exit(code if code > 0 else 128 - code)


class Running:
    """A running command and its output."""

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


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info < (3, 14):
        sys.exit("Python 3.11 to 3.13 is required. Choose one with make PYTHON=python3.11 ...")
    try:
        make_environment(Path(sys.argv[1]))
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
