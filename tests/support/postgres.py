"""A real PostgreSQL server on loopback, in a folder of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
import pytest
from dagster_dev import wait_until
from processes import free_port

PASSWORD = "canary-of-postgres-7d1f"
_NOBODY = 65534
_DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Database:
    """An empty database, and the variables that lead Dagster to it."""

    port: int
    environment: Mapping[str, str] = field(repr=False)

    def connect(self) -> psycopg2.extensions.connection:
        variables = self.environment
        return psycopg2.connect(
            host=variables["DAGSTER_POSTGRES_HOST"],
            port=self.port,
            dbname=variables["DAGSTER_POSTGRES_DB"],
            user=variables["DAGSTER_POSTGRES_USER"],
            password=variables["DAGSTER_POSTGRES_PASSWORD"],
        )


@contextmanager
def serving_postgres() -> Iterator[Database]:
    """A server while the block lasts.

    Without PostgreSQL on this machine the test is skipped; with CI_POSTGRES=required it fails.
    """
    tools = _tools()
    folder = Path(tempfile.mkdtemp(prefix="ft-postgres-"))  # pytest's own folders are closed to other users
    as_user = {} if os.geteuid() else {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}  # it refuses root
    try:
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            os.chown(path, *((_NOBODY, _NOBODY) if as_user else (-1, -1)))
        options = ["--pgdata", str(folder / "data"), "--username", "reports", "--pwfile", str(folder / "password")]
        subprocess.run(
            [str(tools / "initdb"), *options, "--auth", "scram-sha-256", "--no-sync", "--encoding", "UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_user,
        )
        port = free_port()
        options = ["-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [str(tools / "postgres"), *options], stdout=log, stderr=log, cwd=folder, **as_user
            )
        try:
            database = Database(
                port,
                {
                    "DAGSTER_POSTGRES_HOST": "127.0.0.1",
                    "DAGSTER_POSTGRES_PORT": str(port),
                    "DAGSTER_POSTGRES_DB": "postgres",
                    "DAGSTER_POSTGRES_USER": "reports",
                    "DAGSTER_POSTGRES_PASSWORD": PASSWORD,
                },
            )
            wait_until(lambda: server.poll() is not None or _answers(database), "PostgreSQL answers")
            assert server.poll() is None, (folder / "log").read_text()
            yield database
        finally:
            server.send_signal(signal.SIGINT)  # ends it whoever is still connected
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(database: Database) -> bool:
    try:
        database.connect().close()
    except psycopg2.OperationalError:
        return False
    return True


def _tools() -> Path:
    """Folder of PostgreSQL's programs; Debian keeps those of a server off the PATH."""
    found = [Path(tool).resolve().parent for tool in [shutil.which("initdb")] if tool]
    found += [path.parent for path in sorted(_DEBIAN.glob("*/bin/initdb"))]
    if not found:
        said = "there is no PostgreSQL here (Debian: apt-get install postgresql)"
        pytest.fail(said) if os.environ.get("CI_POSTGRES") == "required" else pytest.skip(said)
    return found[0]
