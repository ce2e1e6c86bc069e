"""Of several runs for the same adapter at once one trains, the others wait for it, and one release results."""

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
from processes import accept_ctrl_c, end_inheriting
from reports import prose_of

from ft_dagster.defs.stages import stale_stages
from ft_dagster.defs.workspace import GPU_POOL, Workspace


@pytest.fixture
def edited(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a finished workspace with an edit that is not trained on yet; a process reads its released adapter."""
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, tmp_path / part, symlinks=True)
    workspace = tmp_path / "workspace"
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.writelines(prose_of(number) for number in range(20, 26))
    with reading_throughout(workspace / "fine_tuned_model") as reads:  # by a process that does not see the variables
        work_in(tmp_path, monkeypatch)
        try:
            yield workspace
        finally:
            end_inheriting("FT_WORKSPACE", str(workspace))
    assert reads.count > 0


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "run"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=accept_ctrl_c
    )


def trainings(instance: dg.DagsterInstance) -> list[str]:
    """Return the runs that started a training process, one entry for each process."""
    said = [(run.run_id, event.user_message) for run in instance.get_runs() for event in instance.all_logs(run.run_id)]
    return [run for run, message in said if message and "ft_dagster.training runs as process" in message]


def require_one_release(workspace: Path, before: int) -> None:
    """Require that everything is up to date by one more release, and that nothing is left of a training."""
    lines = (workspace / ".ft" / "released" / "history.jsonl").read_text().splitlines()
    assert len(lines) == before + 1
    assert (workspace / "fine_tuned_model").resolve().name == json.loads(lines[-1])["adapter"]
    assert len(list((workspace / ".ft" / "store" / "lora_adapter").iterdir())) == 2
    assert not list((workspace / ".ft" / "attempts").iterdir())
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        assert stale_stages(instance, Workspace()) == []
        pool = instance.event_log_storage.get_concurrency_info(GPU_POOL)
        assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)


def test_the_second_of_two_runs_reports_that_it_waits_and_reuses_the_firsts_adapter(edited: Path) -> None:
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


def test_a_run_waiting_for_one_that_is_killed_takes_over_and_continues_its_training(edited: Path) -> None:
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


def test_a_run_next_to_the_daemons_trains_nothing_twice(edited: Path) -> None:
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
