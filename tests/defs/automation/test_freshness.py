"""The freshness check fails only while the released adapter lags behind the reports for longer than allowed."""

import time
from pathlib import Path

import dagster as dg
import pytest
from graphs import run

from ft_dagster.config.settings import load_settings
from ft_dagster.definitions import defs
from ft_dagster.defs.assets.external import look, record
from ft_dagster.defs.automation import freshness
from ft_dagster.defs.automation.freshness import report_freshness, seconds_behind
from ft_dagster.defs.runs.state import BRING_UP_TO_DATE
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation import find_or_evaluate

CHECK = dg.AssetCheckKey(dg.AssetKey("released_adapter"), "keeps_up_with_reports")


def results(instance: dg.DagsterInstance) -> list[bool]:
    """Return the results of the check, oldest first."""
    records = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=10)
    evaluations = [found.evaluation for found in reversed(records)]
    return [found.passed for found in evaluations if isinstance(found, dg.AssetCheckEvaluation)]


def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 3700
    monkeypatch.setattr(freshness.time, "time", lambda: later)


def edit(workspace: Path) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    chapter.write_text(chapter.read_text() + "\nMore.\n")


def look_and_tick(instance: dg.DagsterInstance) -> None:
    record(instance, look(load_settings()), Workspace().recipe)
    report_freshness(instance, Workspace())


def test_the_check_never_fails_while_nothing_changes(
    up_to_date: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert results(up_to_date) == [True]
    an_hour_later(monkeypatch)
    look_and_tick(up_to_date)
    assert results(up_to_date) == [True], "nothing new to say"


def test_the_check_fails_once_a_change_waits_too_long_and_passes_after_a_new_adapter(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(workspace)
    look_and_tick(up_to_date)
    assert results(up_to_date) == [True] and 0 <= seconds_behind(up_to_date, Workspace()) < 600
    with monkeypatch.context() as patch:
        an_hour_later(patch)
        look_and_tick(up_to_date)
        look_and_tick(up_to_date)
        assert results(up_to_date) == [True, False], "said once"
    assert run(up_to_date).success
    assert results(up_to_date)[-1] is True


def test_the_time_counts_from_the_first_change_after_everything_was_up_to_date(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    chapter.write_text(chapter.read_text() + "\n\n")  # an invisible change, for which the adapter is not released again
    look_and_tick(up_to_date)
    assert run(up_to_date, "raw_chapters", "sections").success
    between = time.time()
    edit(workspace)
    look_and_tick(up_to_date)
    assert 0 < seconds_behind(up_to_date, Workspace()) <= time.time() - between


def test_a_change_trained_on_by_hand_before_the_sensor_looked_does_not_count(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    edit(workspace)
    job = defs.resolve_job_def(BRING_UP_TO_DATE)  # as from the UI, without a scan of the reports before
    assert job.execute_in_process(instance=up_to_date).success
    look_and_tick(up_to_date)
    between = time.time()
    edit(workspace)
    look_and_tick(up_to_date)
    assert 0 < seconds_behind(up_to_date, Workspace()) <= time.time() - between


def test_the_allowed_lag_is_a_setting(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(workspace)
    monkeypatch.setenv("FT_LAG_SECONDS", "5000")
    look_and_tick(up_to_date)
    an_hour_later(monkeypatch)
    look_and_tick(up_to_date)
    assert results(up_to_date) == [True]


def test_before_the_first_run_the_check_has_no_result(instance: dg.DagsterInstance, chapters: list[Path]) -> None:
    look_and_tick(instance)
    assert results(instance) == []


def test_the_check_still_fails_in_time_if_a_run_failed_before_reaching_it(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "chapter_markdowns" / "bad.md").write_bytes(b"\xff\xfe")
    assert not run(up_to_date).success
    look_and_tick(up_to_date)
    an_hour_later(monkeypatch)
    look_and_tick(up_to_date)
    assert results(up_to_date)[-1] is False


def test_a_change_made_during_the_last_release_counts(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    edit(workspace)
    record(up_to_date, look(load_settings()), Workspace().recipe)

    def change_meanwhile(*_: object) -> None:
        (workspace / "chapter_markdowns" / "meanwhile.md").write_text("## New\n\nText that came meanwhile.\n")
        record(up_to_date, look(load_settings()), Workspace().recipe)

    with pytest.MonkeyPatch.context() as patch:
        judge = find_or_evaluate.judge
        patch.setattr(find_or_evaluate, "judge", lambda *given: (change_meanwhile(), judge(*given))[1])
        assert run(up_to_date).success
    assert seconds_behind(up_to_date, Workspace()) > 0
