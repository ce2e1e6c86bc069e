"""Dagster's private modules that are used: each says why, and a version that moved one fails here, by name."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ft_dagster

PACKAGE = Path(ft_dagster.__file__).parent


def private_imports() -> Iterator[tuple[str, str, str]]:
    """Module, name, and the line that imports from it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dagster._"):
                for name in node.names:
                    yield str(node.module), name.name, text.splitlines()[node.lineno - 1]


@pytest.mark.parametrize(("module", "name", "line"), private_imports(), ids=lambda value: str(value).rpartition(".")[2])
def test_what_is_private_is_there_and_the_line_says_why_it_is_used(module: str, name: str, line: str) -> None:
    assert hasattr(importlib.import_module(module), name)
    assert "  # private: " in line
