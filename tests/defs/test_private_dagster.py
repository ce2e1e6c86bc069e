"""Every private name of Dagster is used with a reason, and a version that moved one fails here by name."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ft_dagster

PACKAGE = Path(ft_dagster.__file__).parent


def private_imports() -> Iterator[tuple[str, str, str]]:
    """Return the module, the name and the line of each such import."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dagster._"):
                for name in node.names:
                    yield str(node.module), name.name, text.splitlines()[node.lineno - 1]


@pytest.mark.parametrize(("module", "name", "line"), private_imports(), ids=lambda value: str(value).rpartition(".")[2])
def test_private_names_of_dagster_exist_and_their_use_is_explained_in_the_line(
    module: str, name: str, line: str
) -> None:
    assert hasattr(importlib.import_module(module), name)
    assert "  # private: " in line
