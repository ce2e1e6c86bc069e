"""Runs the graph in a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
from machines import remember_machine

from ft_dagster.config.settings import load_settings
from ft_dagster.definitions import defs
from ft_dagster.defs.assets.external import look, record
from ft_dagster.defs.automation.sensor import BRING_UP_TO_DATE
from ft_dagster.defs.runs.state import failure_message
from ft_dagster.defs.workspace import Workspace

TOKEN = "hf_canary_1234567890"
NO_TELEMETRY = {"telemetry": {"enabled": False}}


def run(instance: dg.DagsterInstance, *names: str) -> dg.ExecuteInProcessResult:
    """Scan the reports, then materialize these assets, or all."""
    record(instance, look(load_settings()), Workspace().recipe)
    result = defs.resolve_job_def(BRING_UP_TO_DATE).execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in names] or None,
        raise_on_error=False,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    for event in result.get_step_failure_events():
        print(failure_message(event))  # noqa: T201 - a test that fails shows it
    return result


@contextmanager
def instance_on(workspace: Path, home: Path, cache: Path) -> Iterator[dg.DagsterInstance]:
    """Open an instance for longer than one test, with an environment that names the workspace and its own recipe."""
    remember_machine(cache)
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.local_temp(str(home), overrides=NO_TELEMETRY) as instance,
    ):
        patch.delenv("HUGGINGFACE_TOKEN", raising=False)
        patch.setenv("FT_WORKSPACE", str(workspace))
        patch.setenv("FT_RECIPE", "recipe.yaml")
        patch.setenv("FT_CACHE", str(cache))
        yield instance
