"""When the sensor starts runs automatically, and when it does not."""

import os
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData  # private: no public way to add an event of the engine
from graphs import run

from ft_dagster.config.settings import load_settings
from ft_dagster.definitions import defs
from ft_dagster.defs.automation.sensor import decide
from ft_dagster.defs.runs.state import (
    BRING_UP_TO_DATE,
    CAUSE_TAG,
    REASON_TAG,
    SCHEDULE,
    SENSOR,
    fail_abandoned,
    under_way,
)
from ft_dagster.defs.stages import REPORT_FILES, STAGES, all_materializations, input_version, version_of
from ft_dagster.defs.workspace import Workspace


@pytest.fixture(autouse=True)
def reports_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_SETTLE_SECONDS", "0")


def tick(instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    return decide(instance, load_settings(), Workspace())


def skipped(instance: dg.DagsterInstance) -> str:
    decision = tick(instance)
    assert isinstance(decision, dg.SkipReason)
    return str(decision.skip_message)


def requested(instance: dg.DagsterInstance) -> dg.RunRequest:
    decision = tick(instance)
    assert isinstance(decision, dg.RunRequest), decision
    return decision


BY_SENSOR, BY_SCHEDULE = {"dagster/sensor_name": SENSOR}, {"dagster/schedule_name": SCHEDULE}


def ended(
    instance: dg.DagsterInstance,
    request: dg.RunRequest,
    status: dg.DagsterRunStatus,
    asked_by: dict[str, str] = BY_SENSOR,
) -> None:
    """Record a run for this request that finished with this status, as the daemon does."""
    instance.add_run(
        dg.DagsterRun(
            job_name="bring_up_to_date",
            tags=dict(request.tags) | asked_by,
            status=status,
        )
    )


def edit(workspace: Path, number: int = 1, text: str = "A sentence more.\n") -> None:
    with (workspace / "chapter_markdowns" / f"chapter_{number}.md").open("a") as chapter:
        chapter.write("\n" + text)


def test_nothing_runs_when_nothing_changed(up_to_date: dg.DagsterInstance) -> None:
    assert skipped(up_to_date) == "Everything is up to date."


def test_a_touched_file_and_one_copied_over_itself_are_not_changes(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    os.utime(chapter)
    other = workspace / "chapter_markdowns" / "chapter_2.md"
    copy = other.read_bytes()
    other.unlink()
    other.write_bytes(copy)
    assert skipped(up_to_date) == "Everything is up to date."


@pytest.mark.parametrize("change", ["edit", "new", "rename", "delete"])
def test_a_changed_set_of_chapters_requests_one_run_of_all_stages_with_the_reason(
    up_to_date: dg.DagsterInstance, workspace: Path, change: str
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    match change:
        case "edit":
            edit(workspace)
        case "new":
            (chapter.parent / "chapter_9.md").write_text("# Chapter 9\n\n## RESULTS\n\nNew.\n")
        case "rename":
            chapter.rename(chapter.with_name("chapter_8.md"))
        case "delete":
            chapter.unlink()
    request = requested(up_to_date)
    selected = [key.to_user_string() for key in request.asset_selection or []]
    every = [stage.name for stage in STAGES]
    # The same text under another name gives the same tokens: no training.
    assert selected == (every[: every.index("lora_adapter")] if change == "rename" else every)
    assert request.tags[REASON_TAG] == "raw_chapters: report_files has new content"


def test_an_edit_that_leaves_the_sections_equal_requests_only_the_stages_up_to_them(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    chapter.write_bytes(chapter.read_bytes().replace(b"\n", b"\r\n"))
    assert [key.to_user_string() for key in requested(up_to_date).asset_selection or []] == ["raw_chapters", "sections"]
    assert run(up_to_date, "raw_chapters", "sections").success
    assert skipped(up_to_date) == "Everything is up to date."


def test_what_a_user_materialized_before_the_sensor_looked_is_not_stale(
    instance: dg.DagsterInstance, chapters: list[Path]
) -> None:
    job = defs.resolve_job_def(BRING_UP_TO_DATE)
    light = [stage.key for stage in STAGES[:3]]
    assert job.execute_in_process(instance=instance, asset_selection=light).success
    assert requested(instance).tags[REASON_TAG] == "lora_adapter: never materialized"
    edit(chapters[0].parents[1])
    assert job.execute_in_process(instance=instance, asset_selection=light).success
    assert requested(instance).tags[REASON_TAG] == "lora_adapter: never materialized"
    made = all_materializations(instance)
    assert input_version(made[STAGES[0].key], REPORT_FILES) == version_of(made[REPORT_FILES]), "the UI marks no stage"


def test_an_edit_of_the_same_length_with_its_time_reset_is_detected(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    before = chapter.stat()
    assert skipped(up_to_date) == "Everything is up to date."
    text = chapter.read_text()
    chapter.write_text(text[:-3] + ("x" if text[-3] != "x" else "y") + text[-2:])
    os.utime(chapter, ns=(before.st_atime_ns, before.st_mtime_ns))
    requested(up_to_date)


def test_reports_that_are_being_written_are_left_alone_until_they_have_settled(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(workspace)
    monkeypatch.setenv("FT_SETTLE_SECONDS", "3600")
    assert "somebody may be writing" in skipped(up_to_date)
    monkeypatch.setenv("FT_SETTLE_SECONDS", "0")
    requested(up_to_date)


def test_during_a_run_no_other_is_requested_and_the_change_is_not_lost(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    running = up_to_date.add_run(dg.DagsterRun(job_name="bring_up_to_date", status=dg.DagsterRunStatus.STARTING))
    edit(workspace)
    assert "is under way" in skipped(up_to_date)
    up_to_date.report_run_failed(running)
    requested(up_to_date)


def test_a_failed_run_is_retried_once_and_a_new_change_resets_the_count(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    edit(workspace)
    for _ in range(2):
        ended(up_to_date, requested(up_to_date), dg.DagsterRunStatus.FAILURE)
    assert "2 runs for this content failed" in skipped(up_to_date)
    edit(workspace, text="Another sentence.\n")
    requested(up_to_date)


def test_a_run_canceled_by_a_user_is_not_started_again_before_something_changes(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    edit(workspace)
    ended(up_to_date, requested(up_to_date), dg.DagsterRunStatus.CANCELED)
    assert "for this content was canceled" in skipped(up_to_date)
    edit(workspace, text="Another sentence.\n")
    requested(up_to_date)


def test_failures_before_the_last_run_that_succeeded_do_not_count(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    before = chapter.read_text()
    edit(workspace)
    for _ in range(2):
        ended(up_to_date, requested(up_to_date), dg.DagsterRunStatus.FAILURE)
    assert "2 runs for this content failed" in skipped(up_to_date)
    bad = chapter.read_text()
    chapter.write_text(before)
    assert run(up_to_date, "raw_chapters").success
    chapter.write_text(bad)
    requested(up_to_date)


def test_the_change_stays_pending_until_a_run_with_it_succeeds(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    edit(workspace)
    first = requested(up_to_date)
    ended(up_to_date, first, dg.DagsterRunStatus.FAILURE)
    assert requested(up_to_date).tags[CAUSE_TAG] == first.tags[CAUSE_TAG]
    assert run(up_to_date).success
    assert skipped(up_to_date) == "Everything is up to date."


def test_a_failed_blocking_check_prevents_training_until_it_passes(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    bad = workspace / "chapter_markdowns" / "bad.md"
    bad.write_bytes(b"\xff\xfe")
    requested(up_to_date)
    assert not run(up_to_date).success
    assert "Held back: a blocking check of sections failed" in skipped(up_to_date)
    bad.unlink()
    requested(up_to_date)


@pytest.mark.parametrize("asked_by", [BY_SENSOR, BY_SCHEDULE], ids=["the sensor's", "the schedule's"])
def test_automatic_runs_keep_the_minimum_interval(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch, asked_by: dict[str, str]
) -> None:
    edit(workspace)
    ended(up_to_date, requested(up_to_date), dg.DagsterRunStatus.SUCCESS, asked_by)
    monkeypatch.setenv("FT_MINIMUM_INTERVAL_SECONDS", "3600")
    assert "the minimum interval is 3600 s" in skipped(up_to_date)


def test_an_unusable_configuration_is_reported_and_starts_nothing(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    for chapter in (workspace / "chapter_markdowns").iterdir():
        chapter.unlink()
    assert "No chapters in the workspace" in skipped(up_to_date)
    (workspace / "recipe.yaml").write_text("name: 3")
    assert "The recipe recipe.yaml cannot be used" in skipped(up_to_date)


def test_a_damaged_artifact_is_reported_by_name_and_starts_nothing(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    (manifest,) = (workspace / ".ft" / "store" / "sections").glob("*/artifact.json")
    manifest.write_text("{")
    assert f"{manifest} is damaged" in skipped(up_to_date)


def test_a_run_whose_process_died_is_marked_failed_and_blocks_nothing(up_to_date: dg.DagsterInstance) -> None:
    def started(pid: int) -> dg.DagsterRun:
        made = up_to_date.add_run(dg.DagsterRun(job_name="bring_up_to_date", status=dg.DagsterRunStatus.STARTING))
        up_to_date.report_engine_event("Executing steps", made, EngineEventData.in_process(pid))
        start = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, job_name=made.job_name)
        up_to_date.report_dagster_event(start, made.run_id)
        return made

    alive, gone = started(os.getpid()), started(2**22 - 1)
    assert fail_abandoned(up_to_date) == [gone.run_id]
    assert [found.run_id for found in under_way(up_to_date)] == [alive.run_id]


def test_a_damaged_index_of_files_only_causes_a_full_scan(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    (workspace / ".ft" / "files.db").write_text("damaged")
    assert skipped(up_to_date) == "Everything is up to date."
