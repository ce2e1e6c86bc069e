"""A real Dagster: web server, daemon and code server."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dagster_dev import DagsterDev
from postgres import serving_postgres

collect_ignore = [] if "FT_LONG_TESTS" in os.environ else ["test_canaries.py", "test_kills.py", "test_soak.py"]
"""Minutes each: `make test-long`."""


@pytest.fixture(scope="session")
def new_history() -> Iterator[Callable[[], dict[str, str]]]:
    """Gives the variables that lead Dagster to a history of its own, in which there is nothing yet.

    They are none: it is in DAGSTER_HOME. With FT_TEST_STORAGE=postgres it is a database of a real server.
    """
    storage = os.environ.get("FT_TEST_STORAGE", "sqlite")
    assert storage in ("sqlite", "postgres"), f"FT_TEST_STORAGE={storage} is neither sqlite nor postgres"
    if storage == "sqlite":
        yield dict
    else:
        with serving_postgres() as server:
            yield lambda: server.new_database().environment


@pytest.fixture
def user_interface(workspace: Path, chapters: list[Path], new_history: Callable[[], dict[str, str]]) -> Iterator[str]:
    """`dagster dev` on six chapters, as `make dev` starts it; gives its address."""
    with DagsterDev(workspace.parent, **new_history()) as dev:
        yield dev.address
