"""The Dagster instance of a workspace: the same one for the UI, the daemon and the command line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import dagster as dg

from ft_dagster.settings import Settings
from ft_dagster.store import write_atomically


def open_instance(settings: Settings) -> dg.DagsterInstance:
    """The instance in DAGSTER_HOME (the workspace's `.dagster/` unless set), configured on first use."""
    home = prepare_home(settings)
    os.environ["DAGSTER_HOME"] = home
    return dg.DagsterInstance.get()


def has_instance(settings: Settings) -> bool:
    """Whether Dagster was started on this workspace before."""
    return any((settings.dagster_home / name).exists() for name in ("dagster.yaml", "history", "storage"))


@contextmanager
def instance_to_read(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The instance as it is; an empty one where there is none yet. Makes nothing."""
    if not has_instance(settings):
        with dg.DagsterInstance.ephemeral() as empty:
            yield empty
        return
    os.environ["DAGSTER_HOME"] = str(settings.dagster_home.absolute())
    with dg.DagsterInstance.get() as instance:
        yield instance


def prepare_home(settings: Settings) -> str:
    """Make DAGSTER_HOME, with the shipped dagster.yaml where there is none. Returns its path."""
    home = settings.dagster_home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    if not config.exists():
        shipped = resources.files("ft_dagster.defs") / "dagster.yaml"
        write_atomically(config, shipped.read_bytes())
    return str(home)


if __name__ == "__main__":  # `make dev`: prepare DAGSTER_HOME and print it
    from ft_dagster.settings import load_settings

    print(prepare_home(load_settings()))  # noqa: T201
