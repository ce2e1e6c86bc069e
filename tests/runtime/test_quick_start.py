"""A process that trains or measures does not import modules that it does not need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.runtime.quick_start import UNUSED_PACKAGES, compile_nothing, import_quickly

_NEVER_NEEDED = (*UNUSED_PACKAGES, "torch._inductor.compile_fx")
_START = """
import json, sys
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly
compile_nothing(resolve_recipe(json.loads(sys.argv[2])))
import_quickly(sys.argv[1])
print(json.dumps([name for name in sys.argv[3:] if name in sys.modules]))
"""


def imported(module: str, recipe: dict[str, Any], *names: str) -> list[str]:
    """Return which of the modules a process has imported once it is ready to start."""
    command = [sys.executable, "-c", _START, module, json.dumps(recipe), *names]
    return json.loads(subprocess.check_output(command, text=True))


@pytest.mark.parametrize("module", ["ft_dagster.training.train", "ft_dagster.evaluation.evaluate"])
def test_a_plain_base_needs_no_compiler_and_no_optional_package(module: str, tiny_recipe: dict[str, Any]) -> None:
    assert imported(module, tiny_recipe, *_NEVER_NEEDED, "torch", "peft") == ["torch", "peft"]


@pytest.mark.parametrize("parts", [{"base": {"quantization": "nf4"}}, {"training": {"optimizer": "adamw_bnb_8bit"}}])
def test_functions_that_bitsandbytes_compiles_stay_compiled_if_requested(
    parts: dict[str, Any], tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    changed = tiny_recipe | {name: tiny_recipe.get(name, {}) | fields for name, fields in parts.items()}
    compile_nothing(resolve_recipe(changed))
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_a_module_that_needs_a_hidden_package_can_still_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_hidden_package.py").write_text("answer = 42\n")
    (tmp_path / "needs_it.py").write_text("from a_hidden_package import answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ft_dagster.runtime.quick_start.UNUSED_PACKAGES", ("a_hidden_package",))
    import_quickly("needs_it")
    assert "needs_it" not in sys.modules
    import needs_it

    assert needs_it.answer == 42
