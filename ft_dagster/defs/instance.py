"""The Dagster instance of a workspace, which the UI, the daemon and the command line share."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import dagster as dg

from ft_dagster.config.settings import Settings, SettingsError
from ft_dagster.defs.workspace import GPU_POOL
from ft_dagster.errors import UserError
from ft_dagster.runtime.lease import visible_devices
from ft_dagster.store import formats
from ft_dagster.store.local import write_atomically

_HOST = "DAGSTER_POSTGRES_HOST"
_POSTGRES = (_HOST, *(f"DAGSTER_POSTGRES_{name}" for name in ("PORT", "DB", "USER", "PASSWORD")))
_ONE_SLOT = "default_limit: 1"
_REVISION = re.compile(r"^revision = [\"'](\w+)[\"']", re.MULTILINE)


def open_instance(settings: Settings) -> dg.DagsterInstance:
    """Open the instance in DAGSTER_HOME (the workspace's `.dagster/` unless set). It is configured on first use."""
    os.environ["DAGSTER_HOME"] = prepare_home(settings)
    instance = _instance()
    _require_known_schema(instance, settings)
    events = instance.event_log_storage
    if GPU_POOL not in {pool.name for pool in events.get_pool_limits()}:
        # Dagster sets the limit when a step first asks for a slot, and two runs that ask at once would both get one.
        events.initialize_concurrency_limit_to_default(GPU_POOL)
    return instance


def _require_known_schema(instance: dg.DagsterInstance, settings: Settings) -> None:
    """Raise SettingsError if a newer Dagster has changed the tables of the history."""
    storages = (instance.run_storage, instance.event_log_storage, instance.schedule_storage)
    versions = [version for storage in storages if storage and (version := storage.alembic_version())]
    unknown = [there for there, head in versions if there and there != head and there not in _known_revisions()]
    if unknown:
        raise SettingsError(
            f"The history in {settings.dagster_home} was written by a newer Dagster than {dg.__version__} (revision "
            f"{unknown[0]}). Install that version again, or restore a backup from before the upgrade."
        )


def _known_revisions() -> set[str]:
    """Return the revisions of Dagster's tables that this version knows: its own, and older ones that it can migrate."""
    scripts = resources.files("dagster._core.storage.alembic") / "versions"
    texts = (script.read_text("utf-8") for script in scripts.iterdir() if script.name.endswith(".py"))
    return {found[1] for text in texts if (found := _REVISION.search(text))}


def has_instance(settings: Settings) -> bool:
    """Whether Dagster was started on this workspace before. With PostgreSQL, another machine may have done that."""
    home = settings.dagster_home
    return _HOST in os.environ or any((home / name).exists() for name in ("dagster.yaml", "history", "storage"))


@contextmanager
def instance_to_read(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """Open the existing instance for reading, or an empty one where there is none yet.

    Nothing is created, except DAGSTER_HOME and its dagster.yaml where the history is in PostgreSQL.
    """
    if not has_instance(settings):
        with dg.DagsterInstance.ephemeral() as empty:
            yield empty
        return
    formats.require_known(settings.dagster_home, formats.HOME)
    os.environ["DAGSTER_HOME"] = (
        prepare_home(settings) if _HOST in os.environ else str(settings.dagster_home.absolute())
    )
    with _instance() as instance:
        yield instance


def prepare_home(settings: Settings) -> str:
    """Create DAGSTER_HOME, with the shipped dagster.yaml if it has none, and return its path.

    The pool `gpu` gets one slot for each device that this machine has now. The history is kept in PostgreSQL if the
    environment names a server.

    Raises:
        SettingsError: the environment and an existing dagster.yaml disagree about PostgreSQL.
        StoreError: a newer version of ft_dagster wrote the folder.
    """
    home = settings.dagster_home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    formats.mark(home, formats.HOME)
    config = home / "dagster.yaml"
    if not config.exists():
        shipped = _shipped("dagster.yaml") + (_shipped("postgres.yaml") if _HOST in os.environ else "")
        write_atomically(config, shipped.replace(_ONE_SLOT, f"default_limit: {len(visible_devices())}"))
    _require_agreement(config)
    return str(home)


def _shipped(name: str) -> str:
    return (resources.files("ft_dagster.defs") / name).read_text("utf-8")


def _require_agreement(config: Path) -> None:
    text = config.read_text("utf-8")
    if _HOST in os.environ and "postgres" not in text:
        raise SettingsError(
            f"{_HOST} is set, and {config} keeps the history in a folder. Unset it, or name another DAGSTER_HOME: the "
            "history in PostgreSQL starts empty."
        )
    if missing := [name for name in _POSTGRES if name in text and name not in os.environ]:
        raise SettingsError(f"{config} keeps the history in PostgreSQL, and {', '.join(missing)} is not set.")


def _instance() -> dg.DagsterInstance:
    try:
        return dg.DagsterInstance.get()
    except Exception as error:  # PostgreSQL's client may not be installed, so its errors cannot be named here
        if _HOST not in os.environ:
            raise
        said = " ".join(str(_first_cause(error)).split())
        raise SettingsError(
            f"The history in PostgreSQL cannot be opened: {said}. Check the server and "
            f"{_HOST}, _PORT, _DB, _USER and _PASSWORD; the extra ft_dagster[postgres] must be installed."
        ) from None


def _first_cause(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


if __name__ == "__main__":  # for `make dev`: prepare DAGSTER_HOME and print its path
    from ft_dagster.config.settings import load_settings
    from ft_dagster.defs.runs.orphans import end_orphans

    try:
        home = prepare_home(load_settings())
        if ended := end_orphans(home):
            print(f"Stopped the servers of a `make dev` that was killed: {ended}", file=sys.stderr)  # noqa: T201
        print(home)  # noqa: T201
    except UserError as error:
        sys.exit(str(error))
