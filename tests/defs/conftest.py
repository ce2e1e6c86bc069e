"""Instances of Dagster for tests: empty, or of a copy of the workspace that is up to date."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from graphs import NO_TELEMETRY


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def up_to_date(finished: Path, workspace: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The instance of a workspace that is up to date: copies of both, to be changed."""
    shutil.copytree(finished / "workspace", workspace, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(finished / "home", tmp_path / "home")
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=NO_TELEMETRY) as instance:
        yield instance
