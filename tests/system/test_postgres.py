"""Dagster's history in a real PostgreSQL: the main job, a retraining by the daemon, and a hidden password."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from commands import as_process, work_in
from dagster_dev import DagsterDev, wait_until
from dagster_ui import graphql, steps
from postgres import PASSWORD, Database, Server, serving_postgres
from processes import command_of, free_port
from reports import prose_of

from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.defs.instance import open_instance, prepare_home
from ft_dagster.defs.runs import child_process
from ft_dagster.defs.runs.child_process import ChildProcess

PROJECT = Path(__file__).parents[2]


RESTARTS = int(os.environ.get("FT_TEST_RESTARTS", "1"))
"""How often the server is restarted, at each of two moments."""
BEYOND_DAGSTER = 15.0
"""Seconds: Dagster itself tries to connect for about 11."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving_postgres() as found:
        yield found


@pytest.fixture
def database(server: Server) -> Database:
    return server.new_database()


def work_on(database: Database, finished: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make commands work in a workspace with a store and without a history, which will be in PostgreSQL."""
    shutil.copytree(finished / "workspace", folder / "workspace", symlinks=True)
    workspace = work_in(folder, patch)
    for name, value in database.environment.items():
        patch.setenv(name, value)
    return workspace


@pytest.fixture
def on_postgres(database: Database, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make such a workspace."""
    return work_on(database, finished, tmp_path, monkeypatch)


@dataclass(frozen=True)
class Deployed:
    """A workspace whose history in PostgreSQL started with a run in a terminal, and `dagster dev` on it."""

    folder: Path
    database: Database
    dev: DagsterDev
    said: str
    """By the run."""

    @property
    def chapter(self) -> Path:
        return self.folder / "workspace" / "chapter_markdowns" / "chapter_1.md"


@pytest.fixture(scope="module")
def deployed(server: Server, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    database, folder = server.new_database(), tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch:
        work_on(database, finished, folder, patch)
        done = as_process("run")
        assert done.returncode == 0, done.stderr
        assert not list((folder / "home").rglob("*.db")), "nothing is kept beside it"
        patch.setenv("DAGSTER_HOME", str(folder / "other"))
        assert as_process("plan").returncode == 0, "another machine sees the history"
    with DagsterDev(folder, **database.environment) as dev:
        dev.until_up_to_date()
        yield Deployed(folder, database, dev, done.stdout + done.stderr)


def answered(ask: Callable[[], object]) -> bool:
    """Return whether the UI's server answers; each of its connection pools fails once after a restart."""
    try:
        ask()
    except OSError:
        return False
    return True


CHILD = """
import sys, time
from pathlib import Path
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    pipes.report_custom_message({"step": 1})
    while not Path(sys.argv[1]).with_name("go").exists():
        time.sleep(0.1)
    pipes.report_custom_message({"step": 2})
"""


def test_a_child_that_exits_during_a_server_outage_is_undisturbed_and_recorded_later(
    server: Server, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**database.environment, "PYTHONPATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_HOME", prepare_home(Settings(workspace=tmp_path, DAGSTER_HOME=tmp_path / "home")))
    (tmp_path / "child_of_the_test.py").write_text(CHILD)
    request = tmp_path / "request.json"
    request.write_text("{}")
    asked: list[bool | None] = []  # between two messages, whether another process ended the run
    ask = child_process._has_ended

    def asking(context: dg.AssetExecutionContext) -> bool | None:
        asked.append(ask(context))
        return asked[-1]

    monkeypatch.setattr(child_process, "_has_ended", asking)

    @dg.asset
    def stage(context: dg.AssetExecutionContext) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
        yield from ChildProcess().run(context, "child_of_the_test", request, tmp_path / "child.log")
        yield dg.MaterializeResult()

    with dg.DagsterInstance.get() as instance, ThreadPoolExecutor() as thread:
        result = thread.submit(dg.materialize, [stage], instance=instance, raise_on_error=False)

        def observed() -> list[int]:
            records = instance.fetch_observations(stage.key, limit=5, ascending=True).records
            return [int(r.asset_observation.metadata["step"].value) for r in records if r.asset_observation]

        wait_until(lambda: observed() == [1], "the child has told something")
        before = len(asked)
        wait_until(lambda: len(asked) > before, "Dagster has stored all that goes with it")
        child = next(p for p in psutil.Process().children() if "child_of_the_test" in command_of(p))
        server.stop()
        (tmp_path / "go").touch()
        psutil.wait_procs([child])
        time.sleep(BEYOND_DAGSTER)
        server.start()
        assert result.result().success
        assert observed() == [1, 2]


def test_main_job_and_daemon_retraining_use_postgres_without_exposing_the_password(
    deployed: Deployed,
) -> None:
    dev, chapter = deployed.dev, deployed.chapter
    runs = dev.runs_for(lambda: chapter.write_text(f"{chapter.read_text()}\nThe ferry went only once.\n"))
    assert [run.status for run in runs] == ["SUCCESS"]
    assert dev.not_fresh() == set()
    shown = graphql(dev.address, "{ instance { info } }")["instance"]["info"]
    assert "PostgresEventLogStorage" in shown and PASSWORD not in shown
    commands = [command_of(process) for process in dev.processes()]
    assert commands and PASSWORD not in str(commands)
    kept = deployed.database.tables()
    assert kept["runs"] and kept["event_logs"]
    assert [name for name, rows in kept.items() if PASSWORD in rows] == []
    files = [path for path in deployed.folder.rglob("*") if path.is_file()]
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
    assert PASSWORD not in deployed.said


def test_a_server_restart_in_the_middle_of_a_run_loses_no_edit_and_no_training(
    server: Server, deployed: Deployed
) -> None:
    dev = deployed.dev
    lost = []
    for number in range(RESTARTS):
        for training, away in ((False, 0.0), (True, BEYOND_DAGSTER)):
            made, before = dev.made(), dev.runs()
            with deployed.chapter.open("a") as file:
                file.write(f"\nOn day {number} the ferry went {'twice' if training else 'once'}.\n")
                if training:  # takes some seconds to train on
                    file.writelines(prose_of(100 * number + new) for new in range(20, 26))
            (run,) = wait_until(lambda before=before: dev.runs()[len(before) :], "a run is asked for")
            if training:
                dev.until_training()
            else:
                wait_until(lambda run=run: steps(dev.address, run.id), "a light stage has begun")
            server.stop()
            time.sleep(away)
            server.start()
            for ask in (dev.runs, lambda: dev.ticks_since(0), dev.not_fresh):
                wait_until(lambda ask=ask: answered(ask), "the UI has noticed that its connections are gone")
            dev.until_up_to_date()
            runs = dev.runs()[len(before) :]
            assert [run.status for run in runs[:-1]] in ([], ["FAILURE"]) and runs[-1].status == "SUCCESS"
            assert len(dev.made().adapters - made.adapters) == 1
            assert len(dev.made().trainings - made.trainings) == 1, "nothing was trained twice"
            assert dev.not_fresh() == set()
            lost += [(training, run.id) for run in runs[:-1]]
    print(f"{2 * RESTARTS} restarts, {len(lost)} runs tried again: {lost}")  # noqa: T201 - a figure
    assert dev.watches()


def test_the_shipped_file_adds_only_the_storage_to_that_of_one_machine() -> None:
    package = PROJECT / "ft_dagster" / "defs"
    deployed = (PROJECT / "deploy" / "postgres" / "dagster.yaml").read_text()
    parts = [(package / name).read_text() for name in ("dagster.yaml", "postgres.yaml")]
    assert deployed == "".join(parts)
    assert yaml.safe_load(deployed) == yaml.safe_load(parts[0]) | yaml.safe_load(parts[1])


def test_a_server_that_cannot_be_used_is_named_without_the_password(
    on_postgres: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_USER", "somebody")
    done = as_process("plan")
    assert done.returncode == 1
    assert "The history in PostgreSQL cannot be opened:" in done.stderr and "somebody" in done.stderr
    assert PASSWORD not in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("DAGSTER_POSTGRES_PORT", str(free_port()))
    with pytest.raises(SettingsError, match="Connection refused"):
        open_instance(load_settings())


def test_a_home_that_contradicts_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_POSTGRES_HOST", raising=False)
    settings = Settings(workspace=tmp_path, DAGSTER_HOME=tmp_path / "folder")
    prepare_home(settings)
    monkeypatch.setenv("DAGSTER_POSTGRES_HOST", "db")
    with pytest.raises(SettingsError, match=r"DAGSTER_POSTGRES_HOST is set, and .* keeps the history in a folder"):
        prepare_home(settings)
    with pytest.raises(SettingsError, match=r"DAGSTER_POSTGRES_PORT, .*DAGSTER_POSTGRES_PASSWORD is not set"):
        prepare_home(Settings(workspace=tmp_path, DAGSTER_HOME=tmp_path / "postgres"))
