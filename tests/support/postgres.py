"""A real PostgreSQL server on loopback, in a folder of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from dagster_dev import wait_until
from processes import free_port

USER = "reports"
PASSWORD = "canary-of-postgres-7d1f"
_NOBODY = 65534
_DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Database:
    """An empty database, and the variables that make Dagster use it."""

    server: "Server"
    name: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "DAGSTER_POSTGRES_HOST": "127.0.0.1",
            "DAGSTER_POSTGRES_PORT": str(self.server.port),
            "DAGSTER_POSTGRES_DB": self.name,
            "DAGSTER_POSTGRES_USER": USER,
            "DAGSTER_POSTGRES_PASSWORD": PASSWORD,
        }

    def connect(self) -> psycopg2.extensions.connection:
        return psycopg2.connect(host="127.0.0.1", port=self.server.port, dbname=self.name, user=USER, password=PASSWORD)

    def tables(self) -> dict[str, str]:
        """Every row of every table, as text."""
        with closing(self.connect()) as connection:
            cursor = connection.cursor()
            cursor.execute("select table_name from information_schema.tables where table_schema = 'public'")
            names = [name for (name,) in cursor.fetchall()]
            found = {}
            for name in names:
                cursor.execute(f'select "{name}"::text from "{name}"')
                found[name] = "\n".join(row for (row,) in cursor.fetchall())
        return found


class Server:
    """PostgreSQL with its own port and folder; its data survive a restart."""

    def __init__(self, tools: Path, folder: Path, as_user: Mapping[str, Any]) -> None:
        self.port = free_port()
        self._tools, self._folder, self._as_user = tools, folder, as_user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-D", str(self._folder / "data"), "-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = process = subprocess.Popen(
                [str(self._tools / "postgres"), *options, "-F"],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},  # no variable by which a test finds its own processes
                **self._as_user,
            )
        wait_until(lambda: process.poll() is not None or _answers(Database(self, "postgres")), "PostgreSQL answers")
        assert process.poll() is None, self.log

    def stop(self) -> None:
        """Shut down fast, as `systemctl stop` does: connected clients are cut off."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def new_database(self) -> Database:
        """Create an empty database."""
        database = Database(self, f"history_{uuid.uuid4().hex[:8]}")
        with closing(Database(self, "postgres").connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"create database {database.name}")
        return database

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()


@contextmanager
def serving_postgres() -> Iterator[Server]:
    """Run a server during the block.

    Without PostgreSQL on this machine the test is skipped; with CI_POSTGRES=required it fails.
    """
    tools = _tools()
    folder = Path(tempfile.mkdtemp(prefix="ft-postgres-"))  # pytest's own folders are closed to other users
    as_user = {} if os.geteuid() else {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}  # it refuses root
    try:
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            os.chown(path, *((_NOBODY, _NOBODY) if as_user else (-1, -1)))
        options = ["--pgdata", str(folder / "data"), "--username", USER, "--pwfile", str(folder / "password")]
        subprocess.run(
            [str(tools / "initdb"), *options, "--auth", "scram-sha-256", "--no-sync", "--encoding", "UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_user,
        )
        server = Server(tools, folder, as_user)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(database: Database) -> bool:
    try:
        database.connect().close()
    except psycopg2.OperationalError:
        return False
    return True


def _tools() -> Path:
    """Return the folder of PostgreSQL's programs; Debian keeps those of the server off the PATH."""
    found = [Path(tool).resolve().parent for tool in [shutil.which("initdb")] if tool]
    found += [path.parent for path in sorted(_DEBIAN.glob("*/bin/initdb"))]
    if not found:
        said = "there is no PostgreSQL here (Debian: apt-get install postgresql)"
        pytest.fail(said) if os.environ.get("CI_POSTGRES") == "required" else pytest.skip(said)
    return found[0]
