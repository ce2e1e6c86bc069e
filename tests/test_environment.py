"""`make` sets up its environment quietly, and shows everything if that fails; with real pip and uv, small packages."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import PROJECT
from package_index import add_wheel

from ft_dagster.store.hashing import file_digest

BACKEND = '''
"""A build backend that writes a banner."""
import zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    print("*" * 80 + "\\nA banner about editable installations\\n" + "*" * 80)
    return build("ours-1-py3-none-any.whl", wheel_directory)

def build(name, folder):
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        archive.writestr("ours.py", "")
        archive.writestr("ours-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: ours\\nVersion: 1\\n")
        archive.writestr("ours-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("ours-1.dist-info/RECORD", "")
    return name
'''
PYTHON = ".".join(map(str, sys.version_info[:3]))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the real Makefile and setup, and locks that name three packages of a few bytes."""
    folder = tmp_path / "project"
    for name in ("Makefile", "deploy/environment.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    files = {name: {f"{name}.py": b""} for name in ("torch", "first", "second")}
    files["uv"] = {"uv-1.data/scripts/uv": Path(sys.executable).with_name("uv").read_bytes()}
    pins = {
        name: f"{name}==1 --hash=sha256:{file_digest(add_wheel(tmp_path, name, '1', content))}\n"
        for name, content in files.items()
    }
    (folder / "requirements-torch.lock").write_text(pins["torch"])
    (folder / "requirements.lock").write_text(pins["first"] + pins["second"] + pins["uv"])
    for name in [name for name in os.environ if name.startswith(("PIP_", "PYTHON", "MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", " ".join(str(path) for path in (tmp_path / "simple").iterdir()))
    return folder


def test_only_stages_are_printed_unless_one_fails(project: Path, tmp_path: Path) -> None:
    make = ["make", ".venv/.ready", f"PYTHON={sys.executable}"]
    stages = [
        f"Environment: .venv, Python {PYTHON}",
        "PyTorch: fetching torch 1",
        "PyTorch: installing it",
        "Packages: fetching up to 3 of requirements.lock",
        "Packages: uv, which installs the others",
        "Packages: installing them",
        "ft_dagster: this folder",
        "PyTorch: libraries that its build needs",
    ]
    missing = (tmp_path / "simple" / "second").rename(tmp_path / "away")
    failed = subprocess.run(make, cwd=project, capture_output=True, text=True, check=False)
    lines = failed.stdout.splitlines()
    assert failed.returncode == 2 and "Error 1" in failed.stderr, "make says with which code the command ended"
    assert lines[:4] == stages[:4]
    assert lines[4].startswith("Packages: fetching up to 3 of requirements.lock: failed. This is the output of ")
    assert "ERROR: No matching distribution found for second==1" in failed.stdout
    assert not (project / ".venv" / ".ready").exists()

    missing.rename(tmp_path / "simple" / "second")
    written = on_a_terminal(make, project)
    shown = [line.rpartition("\r\033[K")[2] for line in written.replace("\r\n", "\n").rstrip().split("\n")]
    assert [re.sub(r", \d:\d\d$", "", line) for line in shown] == [
        *stages[:3],
        f"{stages[3]}, 3 fetched",
        stages[4],
        f"{stages[5]}, 3 installed",
        *stages[6:],
    ]
    imported = [str(project / ".venv" / "bin" / "python"), "-c", "import torch, first, second, ours"]
    assert subprocess.run(imported, check=False).returncode == 0


def on_a_terminal(command: list[str], folder: Path) -> str:
    """Return what a successful command writes to a terminal."""
    ours, its = pty.openpty()
    with subprocess.Popen(command, cwd=folder, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        written = b""
        try:
            while piece := os.read(ours, 4096):
                written += piece
        except OSError:  # how Linux reports the end of a terminal
            pass
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_an_unsupported_python_is_refused_first(project: Path) -> None:
    """The version is faked in the interpreter, because another Python may not be installed."""
    script = (
        "import runpy, sys; sys.version_info = (3, 10, 0); sys.argv = ['environment.py', '.venv']; "
        "runpy.run_path('deploy/environment.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("Python 3.11 to 3.13 is required. Choose one with make ")
    assert done.stdout == "" and not (project / ".venv").exists()
