"""Dagster's history in a real PostgreSQL: the main job, a retraining by the daemon, and a password nobody sees."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from commands import ft_dagster
from dagster_dev import DagsterDev
from dagster_ui import graphql
from postgres import PASSWORD, Database, serving_postgres
from processes import free_port

from ft_dagster.defs.instance import open_instance, prepare_home
from ft_dagster.settings import Settings, SettingsError, load_settings

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with serving_postgres() as found:
        yield found


@pytest.fixture
def on_postgres(database: Database, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a store and no history, whose history is to be in PostgreSQL."""
    shutil.copytree(finished / "workspace", tmp_path / "workspace", symlinks=True)
    for name in ("HUGGINGFACE_TOKEN", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("FT_RECIPE", "recipe.yaml")
    monkeypatch.setenv("FT_CACHE", str(finished / "cache"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "workspace"


def tables(database: Database) -> dict[str, str]:
    """Every row of every table, as text."""
    with closing(database.connect()) as connection:
        cursor = connection.cursor()
        cursor.execute("select table_name from information_schema.tables where table_schema = 'public'")
        names = [name for (name,) in cursor.fetchall()]
        found = {}
        for name in names:
            cursor.execute(f'select "{name}"::text from "{name}"')
            found[name] = "\n".join(row for (row,) in cursor.fetchall())
    return found


def test_the_main_job_and_a_retraining_by_the_daemon_are_in_postgres_and_the_password_is_nowhere(
    database: Database, on_postgres: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").rglob("*.db")), "nothing is kept beside it"
    with monkeypatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(tmp_path / "other"))
        assert ft_dagster("plan").returncode == 0, "another machine sees the history"
    with DagsterDev(tmp_path, **database.environment) as dev:
        dev.until_up_to_date()
        chapter = on_postgres / "chapter_markdowns" / "chapter_1.md"
        runs = dev.runs_for(lambda: chapter.write_text(f"{chapter.read_text()}\nThe ferry went only once.\n"))
        assert [run.status for run in runs] == ["SUCCESS"]
        assert dev.not_fresh() == set()
        shown = graphql(dev.address, "{ instance { info } }")["instance"]["info"]
        assert "PostgresEventLogStorage" in shown and PASSWORD not in shown
        commands = [process.cmdline() for process in dev.processes()]
        assert commands and PASSWORD not in str(commands)
    kept = tables(database)
    assert kept["runs"] and kept["event_logs"]
    assert [name for name, rows in kept.items() if PASSWORD in rows] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
    assert PASSWORD not in done.stdout + done.stderr


def test_the_shipped_file_is_that_of_one_machine_with_the_storage_added() -> None:
    package = PROJECT / "ft_dagster" / "defs"
    deployed = (PROJECT / "deploy" / "postgres" / "dagster.yaml").read_text()
    parts = [(package / name).read_text() for name in ("dagster.yaml", "postgres.yaml")]
    assert deployed == "".join(parts)
    assert yaml.safe_load(deployed) == yaml.safe_load(parts[0]) | yaml.safe_load(parts[1])


def test_a_server_that_cannot_be_used_is_named_without_the_password(
    on_postgres: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_USER", "somebody")
    done = ft_dagster("plan")
    assert done.returncode == 1
    assert "The history in PostgreSQL cannot be opened:" in done.stderr and "somebody" in done.stderr
    assert PASSWORD not in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("DAGSTER_POSTGRES_PORT", str(free_port()))
    with pytest.raises(SettingsError, match="Connection refused"):
        open_instance(load_settings())


def test_a_home_that_does_not_agree_with_the_environment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_POSTGRES_HOST", raising=False)
    settings = Settings(workspace=tmp_path, DAGSTER_HOME=tmp_path / "folder")
    prepare_home(settings)
    monkeypatch.setenv("DAGSTER_POSTGRES_HOST", "db")
    with pytest.raises(SettingsError, match=r"DAGSTER_POSTGRES_HOST is set, and .* keeps the history in a folder"):
        prepare_home(settings)
    with pytest.raises(SettingsError, match=r"DAGSTER_POSTGRES_PORT, .*DAGSTER_POSTGRES_PASSWORD is not set"):
        prepare_home(Settings(workspace=tmp_path, DAGSTER_HOME=tmp_path / "postgres"))
