"""Measure how many concurrent runs Dagster's history supports, in SQLite and in PostgreSQL.

    python benchmarks/sqlite_limit.py [--runs 5] [--output FILE] [1 2 4 8 ...]

Each number is a number of processes that start together and repeatedly run a job on one DAGSTER_HOME. The job only
writes what a run of the graph writes: six assets with their metadata, nine checks, and fifty observations of a
training. The history is a folder, and then also a PostgreSQL server, if DAGSTER_POSTGRES_HOST and the related variables
name one.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg

from ft_dagster.config.settings import Settings
from ft_dagster.defs.instance import prepare_home
from ft_dagster.defs.stages import STAGES

PROJECT = Path(__file__).parents[1]
_OBSERVATIONS = 50
_CHECKS = 9
_TABLE = "| chapter | bits per byte |\n|---|---|\n" + "| chapter_1 | 1.2345 |\n" * 200
"""About 5 kB of Markdown, like the metadata of a stage."""
_LOCKED = "database is locked"


@dataclass(frozen=True)
class Row:
    """The result for one number of concurrent runs."""

    storage: str
    at_once: int
    runs: int
    failed: int
    locked: int
    """The number of runs in which SQLite reported that its database is locked."""
    seconds: float
    """From the common start until the last process exits."""
    latencies: list[float]
    """The seconds that it took to store each event."""

    def __str__(self) -> str:
        milliseconds = [1000 * seconds for seconds in sorted(self.latencies)] or [float("nan")]
        p99 = milliseconds[int(0.99 * (len(milliseconds) - 1))]
        return (
            f"| {self.storage} | {self.at_once} | {self.runs} | {self.failed} | {self.locked} | "
            f"{self.runs / self.seconds:.2f} | {statistics.median(milliseconds):.1f} | {p99:.0f} | "
            f"{milliseconds[-1]:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("at_once", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--runs", type=int, default=5, help="runs of each process, one after the other")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "sqlite_limit.md")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # run as one of the processes, in this folder
    options = parser.parse_args()
    if options.write:
        _write(options.write, options.runs)
        return
    lines = [
        "# Runs at once on one history",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, dagster {version('dagster')}: "
        f"`python benchmarks/sqlite_limit.py --runs {options.runs} {' '.join(map(str, options.at_once))}`.",
        "",
        "| history | at once | runs | failed | 'database is locked' | runs a second | event stored, median (ms) | 99 % "
        "(ms) | longest (ms) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for storage in ("SQLite", *(["PostgreSQL"] if "DAGSTER_POSTGRES_HOST" in os.environ else [])):
        for at_once in options.at_once:
            lines.append(str(_measure(storage, at_once, options.runs)))
            print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n", "utf-8")


def _measure(storage: str, at_once: int, runs: int) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = dict(os.environ)
        if storage == "SQLite":
            environment = {n: value for n, value in environment.items() if not n.startswith("DAGSTER_POSTGRES_")}
        environment |= {"DAGSTER_HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)}
        with mock.patch.dict(os.environ, environment, clear=True):
            prepare_home(Settings(workspace=folder, DAGSTER_HOME=folder / "home"))
            with dg.DagsterInstance.get() as instance:  # creates the tables before anything is timed
                instance.get_runs(limit=1)
        command = [sys.executable, __file__, "--write", str(folder), "--runs", str(runs)]
        writers = [subprocess.Popen(command, env=environment) for _ in range(at_once)]
        try:
            while len(list(folder.glob("*.ready"))) < at_once:
                assert all(writer.poll() is None for writer in writers), "a process ended before the start"
                time.sleep(0.1)
            (folder / "go").touch()
            began = time.perf_counter()
            codes = [writer.wait() for writer in writers]
            seconds = time.perf_counter() - began
        finally:
            for writer in writers:
                writer.kill()
        assert not any(codes), f"exit codes {codes}"
        found = [json.loads(path.read_bytes()) for path in folder.glob("*.result")]
    return Row(
        storage,
        at_once,
        at_once * runs,
        sum(one["failed"] for one in found),
        sum(one["locked"] for one in found),
        seconds,
        [seconds for one in found for seconds in one["latencies"]],
    )


def _write(folder: Path, runs: int) -> None:
    """Run as one of the processes: wait for the start, run the job repeatedly, and write the measurements to a file."""
    assets = _assets()
    found: dict[str, Any] = {"failed": 0, "locked": 0, "latencies": []}
    with dg.DagsterInstance.get() as instance:
        storage = instance.event_log_storage
        store_event = storage.store_event

        def timed(event: dg.EventLogEntry) -> None:
            began = time.perf_counter()
            store_event(event)
            found["latencies"].append(time.perf_counter() - began)

        storage.store_event = timed  # type: ignore[method-assign]
        (folder / f"{os.getpid()}.ready").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        for _ in range(runs):
            said = ""
            try:
                result = dg.materialize(assets, instance=instance, raise_on_error=False, run_config=_QUIET)
                failed = not result.success
                said = " ".join(str(event.event_specific_data) for event in result.all_events if event.is_failure)
            except Exception:
                failed, said = True, traceback.format_exc()
            found["failed"] += failed
            found["locked"] += _LOCKED in said
            if failed and _LOCKED not in said:
                print(said[-2000:], file=sys.stderr)
    (folder / f"{os.getpid()}.result").write_text(json.dumps(found))


_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _assets() -> list[dg.AssetsDefinition]:
    def define(name: str, parent: str | None) -> dg.AssetsDefinition:
        checks = _CHECKS // len(STAGES) + (name in ("lora_adapter", "adapter_evaluation", "tokenized_dataset"))

        @dg.asset(
            name=name,
            deps=[parent] if parent else None,
            check_specs=[dg.AssetCheckSpec(f"check_{number}", asset=name) for number in range(checks)],
        )
        def stage(context: dg.AssetExecutionContext) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
            for number in range(_OBSERVATIONS if name == "lora_adapter" else 0):
                yield dg.AssetObservation(name, metadata={"step": number, "loss": 1.0})
            yield dg.MaterializeResult(
                data_version=dg.DataVersion(context.run.run_id),
                metadata={"table": dg.MetadataValue.md(_TABLE), "bytes": 12345},
                check_results=[
                    dg.AssetCheckResult(passed=True, check_name=f"check_{number}") for number in range(checks)
                ],
            )

        return stage

    names = [stage.name for stage in STAGES]
    return [define(name, parent) for name, parent in zip(names, [None, *names[:-1]], strict=True)]


if __name__ == "__main__":
    main()
