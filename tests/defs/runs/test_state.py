"""Which runs count as failed."""

import socket
import time
from pathlib import Path

import dagster as dg
import graphs
import psutil
import pytest
from dagster._core.events import EngineEventData, StepFailureData  # private: to write events as the engine does
from dagster_shared.error import SerializableErrorInfo  # private: part of such an event

from ft_dagster.defs.runs.run_host import RUN_HOST_TAG, RunHost, host_of, this_host
from ft_dagster.defs.runs.state import BRING_UP_TO_DATE, CAUSE_TAG, cancelled_for, fail_abandoned, failures_for

NO_SUCH_PROCESS = 2**22 - 1


def begun(instance: dg.DagsterInstance, at: float, place: RunHost | None = None) -> dg.DagsterRun:
    """Add an automatic run started by a process that is gone, or that never ran on this machine."""
    tags = {CAUSE_TAG: "cause"} | ({RUN_HOST_TAG: str(place)} if place else {})
    run = dg.DagsterRun(job_name="bring_up_to_date", status=dg.DagsterRunStatus.STARTING, tags=tags)
    instance.add_run(run)
    instance.report_engine_event("Executing steps", run, EngineEventData.in_process(NO_SUCH_PROCESS))
    start = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, job_name=run.job_name)
    instance.report_dagster_event(start, run.run_id, timestamp=at)
    return run


@pytest.mark.parametrize(("began", "tries"), [("before this server", 0), ("since", 1)])
def test_a_killed_run_counts_as_failed_unless_dagster_restarted_since(
    instance: dg.DagsterInstance, began: str, tries: int
) -> None:
    run = begun(instance, at=time.time() - (7 * 86400 if began == "before this server" else 0))
    assert fail_abandoned(instance) == [run.run_id]
    assert failures_for(instance, "cause") == tries


@pytest.mark.parametrize(("error", "tries"), [("DagsterExecutionInterruptedError", 0), ("RuntimeError", 1)])
def test_a_run_interrupted_together_with_dagster_does_not_count_as_failed(
    instance: dg.DagsterInstance, error: str, tries: int
) -> None:
    run = begun(instance, at=time.time())
    failure = StepFailureData(SerializableErrorInfo("ended", [], error), user_failure_data=None)
    event = dg.DagsterEvent(
        dg.DagsterEventType.STEP_FAILURE.value,
        run.job_name,
        step_key="lora_adapter",
        event_specific_data=failure,
    )
    instance.report_dagster_event(event, run.run_id)
    instance.report_run_failed(run)
    assert failures_for(instance, "cause") == tries


@pytest.mark.parametrize(("asked_for", "tries"), [("before this server", 0), ("since", 1)])
def test_a_run_that_never_started_counts_as_failed_unless_dagster_restarted_since(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, asked_for: str, tries: int
) -> None:
    if asked_for == "before this server":
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: time.time() + 60)
    run = instance.add_run(
        dg.DagsterRun(job_name=BRING_UP_TO_DATE, status=dg.DagsterRunStatus.STARTING, tags={CAUSE_TAG: "cause"})
    )
    instance.report_run_failed(run, "Run timed out due to taking longer than 120 seconds to start.")
    assert failures_for(instance, "cause") == tries


def test_a_run_canceled_by_a_user_is_no_failure_and_is_reported_until_one_succeeds(
    instance: dg.DagsterInstance,
) -> None:
    run = begun(instance, at=time.time())
    instance.report_run_canceled(run)
    assert failures_for(instance, "cause") == 0
    found = cancelled_for(instance, "cause")
    assert found and found.run_id == run.run_id and cancelled_for(instance, "another cause") is None
    instance.add_run(dg.DagsterRun(job_name=BRING_UP_TO_DATE, status=dg.DagsterRunStatus.SUCCESS))
    assert cancelled_for(instance, "cause") is None


def test_a_run_on_another_machine_is_left_alone(instance: dg.DagsterInstance) -> None:
    begun(instance, at=time.time() - 3600, place=RunHost("elsewhere"))
    assert fail_abandoned(instance) == []


def test_a_run_that_a_launcher_monitors_is_left_to_the_launcher(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(instance, at=time.time() - 3600)
    monkeypatch.setattr(type(instance.run_launcher), "supports_check_run_worker_health", True)
    assert fail_abandoned(instance) == []


@pytest.mark.parametrize(
    ("job", "start", "given_up"),
    [(7, 0, True), (7, 1, True), (7, 2, False), (8, 0, False)],
    ids=["its first start", "its second start", "this start", "another job"],
)
def test_a_run_of_an_earlier_start_of_the_same_slurm_job_is_abandoned(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, job: int, start: int, given_up: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run = begun(instance, at=time.time() - 3600, place=RunHost("elsewhere", job, start))
    assert fail_abandoned(instance) == [run.run_id] * given_up
    assert failures_for(instance, "cause") == 0, "nothing is wrong with its content"


def test_a_run_records_its_host(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [host_of(run) for run in up_to_date.get_runs()] == [this_host()]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert this_host() == RunHost(socket.gethostname(), 7, 0)
    assert graphs.run(up_to_date, "raw_chapters").success
    assert [host_of(run) for run in up_to_date.get_runs(limit=1)] == [this_host()]
