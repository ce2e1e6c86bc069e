"""Old runs in Dagster's history: events, logs and, in SQLite, a file for each run."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import dagster as dg
from dagster._core.storage.event_log import SqliteEventLogStorage  # private: which files hold a run is not public

from ft_dagster.defs.stages import BASE_MODEL, REPORT_FILES, STAGES

_FILES = ("", "-journal", "-wal", "-shm")
"""What SQLite may have beside a database, and the database itself."""


def old_runs(instance: dg.DagsterInstance, keep: int) -> list[str]:
    """Ids of runs that have ended and are not needed, oldest first.

    Needed are the newest `keep`, those in which an asset got what it holds now, and the last success with
    all that came after it, by which the watcher tells how often a change has failed.
    """
    runs = list(instance.get_runs())  # newest first
    success = next((n for n, run in enumerate(runs) if run.status is dg.DagsterRunStatus.SUCCESS), len(runs))
    needed = set(_holding(instance))
    older = runs[max(keep, success + 1) :]
    return [run.run_id for run in reversed(older) if run.is_finished and run.run_id not in needed]


def forget_runs(instance: dg.DagsterInstance, runs: Iterable[str]) -> None:
    """Delete runs with their events and logs: plots and the list of runs lose them, and no artifact is touched."""
    for run in runs:
        instance.delete_run(run)
        instance.compute_log_manager.delete_logs(prefix=[run])
        for file in run_files(instance, run):
            file.unlink(missing_ok=True)  # Dagster leaves it with its size, emptied


def run_files(instance: dg.DagsterInstance, run: str) -> list[Path]:
    """The files that hold the events of one run; none where the history is a server's."""
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
