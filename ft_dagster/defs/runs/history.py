"""Deletion of old runs from Dagster's history: events, logs and, with SQLite, a database file for each run."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import dagster as dg
from dagster._core.storage.event_log import SqliteEventLogStorage  # private: which files hold a run is not public

from ft_dagster.defs.stages import BASE_MODEL, REPORT_FILES, STAGES

_FILES = ("", "-journal", "-wal", "-shm")
"""Endings of the database file and of the files that SQLite may write beside it."""


def old_runs(instance: dg.DagsterInstance, keep: int) -> list[str]:
    """Return the ids of finished runs that are not needed any more, oldest first.

    These runs are needed: the newest `keep`; the runs of the latest materialization and observation of each asset; and
    the last successful run with all runs after it, from which the sensor counts how often a change has failed.
    """
    runs = list(instance.get_runs())  # newest first
    success = next((n for n, run in enumerate(runs) if run.status is dg.DagsterRunStatus.SUCCESS), len(runs))
    needed = set(_holding(instance))
    older = runs[max(keep, success + 1) :]
    return [run.run_id for run in reversed(older) if run.is_finished and run.run_id not in needed]


def forget_runs(instance: dg.DagsterInstance, runs: Iterable[str]) -> None:
    """Delete runs with their events and logs. Plots and the list of runs lose them; artifacts stay."""
    for run in runs:
        instance.delete_run(run)
        instance.compute_log_manager.delete_logs(prefix=[run])
        for file in run_files(instance, run):
            file.unlink(missing_ok=True)  # Dagster empties the file, but does not delete it


def run_files(instance: dg.DagsterInstance, run: str) -> list[Path]:
    """Return the files that contain the events of one run; none if the history is in a database server."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage):
        return []
    files = [Path(storage.path_for_shard(run) + ending) for ending in _FILES]
    return [file for file in files if file.exists()]


def _holding(instance: dg.DagsterInstance) -> Iterator[str]:
    for record in instance.get_asset_records([REPORT_FILES, BASE_MODEL, *(stage.key for stage in STAGES)]):
        entry = record.asset_entry
        for event in (entry.last_materialization_record, entry.last_observation_record):
            if event is not None:
                yield event.run_id
