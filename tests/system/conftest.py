"""Fixtures with a real Dagster: web server, daemon and code server."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dagster_dev import DagsterDev

collect_ignore = [] if "FT_LONG_TESTS" in os.environ else ["test_canaries.py", "test_kills.py", "test_soak.py"]
"""Tests that take minutes each, run by `make test-long`."""


@pytest.fixture
def user_interface(workspace: Path, chapters: list[Path], new_history: Callable[[], dict[str, str]]) -> Iterator[str]:
    """Start `dagster dev` on six chapters, as `make dev` does, and return its address."""
    with DagsterDev(workspace.parent, **new_history()) as dev:
        yield dev.address
