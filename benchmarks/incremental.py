"""Measure the cost of an edit among 100 to 100,000 chapters, compared with recomputing everything.

    python benchmarks/incremental.py --reports FOLDER [SIZES ...]

Every figure is measured on the real graph in its own workspace, with its own SQLite instance of Dagster and the base
model's real tokenizer. Every phase runs in a new process, so that memory and CPU-seconds are its own. Chapters are made
from the given reports by recombining sections (benchmarks/corpus.py).
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
UP_TO_DATASET = ["raw_chapters", "sections", "tokenized_dataset"]
EDITS = 5
PAGE = """{ assetNodes { assetKey { path } staleStatus staleCauses { reason } assetMaterializations(limit: 20) {
  timestamp metadataEntries { label description ... on MarkdownMetadataEntry { mdStr }
  ... on IntMetadataEntry { intRepr } ... on FloatMetadataEntry { floatValue } } }
  assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization { status } } } } } }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--reports", type=Path, default=PROJECT / "ft_dagster" / "examples" / "chapter_markdowns")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "incremental.md")
    parser.add_argument("--scratch", type=Path, help="where workspaces are made (default: a temporary folder)")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(PHASES[options.phase]()))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for size in options.sizes:
            rows.append(measure(Path(scratch) / str(size), options.reports, size))
            print(json.dumps(rows[-1]), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(as_table(rows, options.reports))
            shutil.rmtree(Path(scratch) / str(size))


def measure(workspace: Path, reports: Path, size: int) -> dict[str, Any]:
    """Measure all columns for one size."""
    from benchmarks.corpus import write_chapters

    row: dict[str, Any] = {"chapters": size, "MB": write_chapters(reports, workspace, size) / 1e6}
    row["first scan"] = phase("scan", workspace)
    time.sleep(3)  # files changed less than 2 s before hashing are hashed again
    row["scan, nothing changed"] = median(phase("scan", workspace) for _ in range(EDITS))
    row["all"] = phase("run", workspace)
    row["store MB"] = folder_size(workspace / ".ft") / 1e6
    row["edit"] = median(edit_one(workspace, number * size // EDITS) for number in range(EDITS))
    row["store MB after edits"] = folder_size(workspace / ".ft") / 1e6
    time.sleep(3)
    row["quiet tick"] = median(phase("quiet tick", workspace) for _ in range(EDITS))
    row["tick"] = median(phase("tick", workspace) for _ in range(EDITS))
    row["plan"] = median(command(workspace, "plan", "--json") for _ in range(EDITS))
    row["page"] = page_query(workspace)
    return row


def edit_one(workspace: Path, number: int) -> dict[str, float]:
    path = workspace / "chapter_markdowns" / f"part_{number // 1000}" / f"chapter_{number}.md"
    path.write_text(path.read_text() + f"\nA sentence more, at {time.time_ns()}.\n")
    return phase("run", workspace)


def phase(name: str, workspace: Path) -> dict[str, float]:
    """Run a phase in a new process."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--phase", name],
        env=environment(workspace),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def environment(workspace: Path) -> dict[str, str]:
    return os.environ | {
        "FT_WORKSPACE": str(workspace),
        "FT_SETTLE_SECONDS": "0",
        "PYTHONPATH": str(PROJECT),
        "DAGSTER_HOME": str(workspace / ".dagster"),
    }


def timed(work: Callable[[], Any]) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "s": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def scan_phase() -> dict[str, float]:
    from ft_dagster.config.settings import load_settings
    from ft_dagster.defs.assets.external import look

    settings = load_settings()
    return timed(lambda: look(settings).version)


def run_phase() -> dict[str, float]:
    import dagster as dg

    from ft_dagster.config.settings import load_settings
    from ft_dagster.definitions import defs
    from ft_dagster.defs.assets.external import look, record
    from ft_dagster.defs.automation.sensor import BRING_UP_TO_DATE
    from ft_dagster.defs.instance import open_instance
    from ft_dagster.defs.workspace import Workspace

    settings = load_settings()

    def work() -> None:
        with open_instance(settings) as instance:
            record(instance, look(settings), Workspace().recipe)
            result = defs.resolve_job_def(BRING_UP_TO_DATE).execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey(name) for name in UP_TO_DATASET],
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
            assert result.success

    return timed(work)


def quiet_tick_phase() -> dict[str, float]:
    """Measure a tick that requests no run, because two runs for this content are recorded as failed."""
    import dagster as dg

    from ft_dagster.config.settings import load_settings
    from ft_dagster.defs.automation.sensor import decide
    from ft_dagster.defs.instance import open_instance
    from ft_dagster.defs.runs.state import BRING_UP_TO_DATE, CAUSE_TAG
    from ft_dagster.defs.stages import cause_of
    from ft_dagster.defs.workspace import Workspace

    settings = load_settings()
    with open_instance(settings) as instance:
        tags = {CAUSE_TAG: cause_of(instance, Workspace().recipe)}
        for _ in range(2):
            instance.add_run(dg.DagsterRun(BRING_UP_TO_DATE, tags=tags, status=dg.DagsterRunStatus.FAILURE))
        taken = timed(lambda: decide(instance, settings, Workspace()))
        for run in instance.get_runs(dg.RunsFilter(tags=tags)):
            instance.delete_run(run.run_id)
    return taken


def tick_phase() -> dict[str, float]:
    from ft_dagster.config.settings import load_settings
    from ft_dagster.defs.automation.sensor import decide
    from ft_dagster.defs.instance import open_instance
    from ft_dagster.defs.workspace import Workspace

    settings = load_settings()
    with open_instance(settings) as instance:
        return timed(lambda: decide(instance, settings, Workspace()))


PHASES = {"scan": scan_phase, "run": run_phase, "tick": tick_phase, "quiet tick": quiet_tick_phase}


def command(workspace: Path, *arguments: str) -> dict[str, float]:
    """Measure an `ft-dagster` command, including the start of Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ft_dagster.cli", *arguments],
        env=environment(workspace),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode in (0, 2), done.returncode
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"s": seconds, "cpu": cpu, "MB": after.ru_maxrss / 1000}


def page_query(workspace: Path) -> float:
    """Return the median seconds, of five, of a web server's answer to a query for everything that asset pages show."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "dagster_webserver", "-m", "ft_dagster.definitions", "-h", "127.0.0.1", "-p", str(port)],
        env=environment(workspace),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        json.dumps({"query": PAGE}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(request, timeout=60).read()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.3)
        times = []
        for _ in range(EDITS):
            began = time.perf_counter()
            content = json.load(urllib.request.urlopen(request, timeout=60))
            times.append(time.perf_counter() - began)
            assert len(content["data"]["assetNodes"]) >= len(UP_TO_DATASET), content
        return statistics.median(times)
    finally:
        server.terminate()
        server.wait()


def median(figures: Any) -> dict[str, float]:
    rows = list(figures)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def folder_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def as_table(rows: list[dict[str, Any]], reports: Path) -> str:
    """Return the page as Markdown."""
    columns = [
        ("chapters", lambda row: f"{row['chapters']:,}"),
        ("text, MB", lambda row: f"{row['MB']:.1f}"),
        ("first scan, s", lambda row: f"{row['first scan']['s']:.2f}"),
        ("scan, nothing changed, s", lambda row: f"{row['scan, nothing changed']['s']:.3f}"),
        ("automation tick, nothing new, s", lambda row: f"{row['quiet tick']['s']:.3f}"),
        ("automation tick that asks for a run, s", lambda row: f"{row['tick']['s']:.3f}"),
        ("`plan`, whole command, s", lambda row: f"{row['plan']['s']:.2f}"),
        ("one edit to tokenized dataset, s (CPU-s)", lambda row: f"{row['edit']['s']:.2f} ({row['edit']['cpu']:.2f})"),
        ("all of it, s (CPU-s)", lambda row: f"{row['all']['s']:.1f} ({row['all']['cpu']:.1f})"),
        ("all / edit, CPU", lambda row: f"{row['all']['cpu'] / row['edit']['cpu']:.0f}"),
        ("memory of the edit, MB", lambda row: f"{row['edit']['MB']:.0f}"),
        ("memory of all, MB", lambda row: f"{row['all']['MB']:.0f}"),
        ("store, MB", lambda row: f"{row['store MB']:.1f}"),
        (f"store after {EDITS} edits, MB", lambda row: f"{row['store MB after edits']:.1f}"),
        ("UI page query, s", lambda row: f"{row['page']:.3f}"),
        ("all, CPU-ms a chapter", lambda row: f"{row['all']['cpu'] / row['chapters'] * 1000:.2f}"),
    ]
    lines = ["| |" + "|".join(f" {columns[0][1](row)} " for row in rows) + "|", "|---|" + "---:|" * len(rows)]
    for name, cell in columns[1:]:
        lines.append(f"| {name} |" + "|".join(f" {cell(row)} " for row in rows) + "|")
    about = (
        "# What an edit costs\n\nChapters are recombined from the sections of real reports, not real ones. Every run "
        f"goes through Dagster. Edits, scans, ticks and plans: median of {EDITS}. `python benchmarks/incremental.py "
        f"--reports {reports.name}`, {os.cpu_count()} cores.\n\n"
    )
    return about + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    main()
