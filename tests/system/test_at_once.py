"""Of those who ask for the same adapter at once one trains, the others wait for it, and one release comes of it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
import pytest
from adapter_reader import reading_throughout
from commands import COMMAND, work_in
from dagster_dev import DagsterDev, training_held, until_one_waits
from processes import end_inheriting, heed_ctrl_c
from reports import prose_of

from ft_dagster.defs.stages import stale_stages
from ft_dagster.defs.workspace import GPU_POOL, Workspace


@pytest.fixture
def edited(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished workspace with an edit that has not been learned, and what reads its released adapter."""
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, tmp_path / part, symlinks=True)
    workspace = tmp_path / "workspace"
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.writelines(prose_of(number) for number in range(20, 26))
    with reading_throughout(workspace / "fine_tuned_model") as reads:  # by a process that the variables do not name
        work_in(tmp_path, monkeypatch)
        try:
            yield workspace
        finally:
            end_inheriting("FT_WORKSPACE", str(workspace))
    assert reads.count > 0


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "run"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heed_ctrl_c
    )


def trainings(instance: dg.DagsterInstance) -> list[str]:
    """The runs that started a process that trains, one entry for each process."""
    said = [(run.run_id, event.user_message) for run in instance.get_runs() for event in instance.all_logs(run.run_id)]
    return [run for run, message in said if message and "ft_dagster.training runs as process" in message]


def require_one_release(workspace: Path, before: int) -> None:
    """All is up to date, by one release after so many; nothing of a training is left."""
    lines = (workspace / ".ft" / "released" / "history.jsonl").read_text().splitlines()
    assert len(lines) == before + 1
    assert (workspace / "fine_tuned_model").resolve().name == json.loads(lines[-1])["adapter"]
    assert len(list((workspace / ".ft" / "store" / "lora_adapter").iterdir())) == 2
    assert not list((workspace / ".ft" / "attempts").iterdir())
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        assert stale_stages(instance, Workspace()) == []
        pool = instance.event_log_storage.get_concurrency_info(GPU_POOL)
        assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)


def test_of_two_runs_one_trains_and_the_other_waits_says_so_and_uses_what_it_made(edited: Path) -> None:
    both = [start()]
    with training_held(edited):
        both.append(start())
        until_one_waits()
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waits for the device" in text for text in said) >= 1
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        assert len(trainings(instance)) == 2, "the one that made the workspace, and one of these"
    require_one_release(edited, before=1)


def test_a_run_that_waits_for_one_that_is_killed_takes_over_and_goes_on_with_its_work(edited: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(start())
        with training_held(edited):
            second = stack.enter_context(start())
            until_one_waits()
            first.kill()
        said = second.communicate(timeout=240)[1]
        assert second.returncode == 0, said
        assert "waits for the device" in said
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        assert len(set(trainings(instance))) == 3
    require_one_release(edited, before=1)


def test_a_run_beside_the_watchers_trains_nothing_twice(edited: Path) -> None:
    with DagsterDev(edited.parent) as dev:
        with training_held(edited):
            beside = start()
            until_one_waits()
        said = beside.communicate(timeout=240)[1]
        assert beside.returncode == 0, said
        dev.until_up_to_date()
        assert {run.status for run in dev.runs()} == {"SUCCESS"}
        with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
            assert len(trainings(instance)) == 2
    require_one_release(edited, before=1)
