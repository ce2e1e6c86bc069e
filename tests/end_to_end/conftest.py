"""A real Dagster: web server, daemon and code server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster_dev import DagsterDev


@pytest.fixture
def user_interface(workspace: Path, chapters: list[Path]) -> Iterator[str]:
    """`dagster dev` on six chapters, as `make dev` starts it; gives its address."""
    with DagsterDev(workspace.parent) as dev:
        yield dev.address
