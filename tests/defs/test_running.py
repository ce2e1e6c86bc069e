"""What a run from a terminal says before its stages begin."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from embedded import fake_conversion
from rich.console import Console

from ft_dagster.defs.running import _prepare_base
from ft_dagster.defs.workspace import Workspace

CONTROLS = re.compile(r"\x1b\[[?\d]*[A-Za-z]")


@pytest.mark.parametrize(
    ("terminal", "said"),
    [(False, "Base model: converting tiny.gguf"), (True, "Base model converting tiny.gguf ✓ 0:00:00")],
)
def test_preparing_an_embedded_base_model_is_one_line_a_step_and_done_once(
    workspace: Path,
    tiny_base: Path,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    said: str,
) -> None:
    fake_conversion(monkeypatch, tmp_path / "package", tiny_base, tmp_path / "log")
    tiny_recipe["base"] = {"source": "embedded", "model": "tiny"}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, color_system=None)
    assert _prepare_base(Workspace(), console)
    assert not _prepare_base(Workspace(), console)
    (line,) = CONTROLS.sub("", written.getvalue().rpartition("\r")[2]).splitlines()
    assert re.sub(r"\d$", "0", line) == said
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_base_model_in_a_folder_needs_no_preparing(workspace: Path) -> None:
    written = io.StringIO()
    assert not _prepare_base(Workspace(), Console(file=written))
    assert written.getvalue() == ""
