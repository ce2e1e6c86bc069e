"""Which runs count as failed tries."""

import time

import dagster as dg
import pytest
from dagster._core.events import StepFailureData
from dagster_shared.error import SerializableErrorInfo

from ft_dagster.defs.runs import CAUSE_TAG, fail_abandoned, failures_for

NO_SUCH_PROCESS = 2**22 - 1


def begun(instance: dg.DagsterInstance, at: float) -> dg.DagsterRun:
    """An automatic run that a process began which is not there any more."""
    run = dg.DagsterRun(job_name="bring_up_to_date", status=dg.DagsterRunStatus.STARTING, tags={CAUSE_TAG: "cause"})
    instance.add_run(run)
    instance.report_engine_event(f"Executing steps in process (pid: {NO_SUCH_PROCESS})", run)
    start = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, job_name=run.job_name)
    instance.report_dagster_event(start, run.run_id, timestamp=at)
    return run


@pytest.mark.parametrize(("began", "tries"), [("before this server", 0), ("since", 1)])
def test_a_killed_run_is_a_failed_try_unless_dagster_was_started_anew_since(
    instance: dg.DagsterInstance, began: str, tries: int
) -> None:
    run = begun(instance, at=time.time() - (7 * 86400 if began == "before this server" else 0))
    assert fail_abandoned(instance) == [run.run_id]
    assert failures_for(instance, "cause") == tries


@pytest.mark.parametrize(("error", "tries"), [("DagsterExecutionInterruptedError", 0), ("RuntimeError", 1)])
def test_a_run_that_was_interrupted_with_dagster_is_no_failed_try(
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


def test_a_run_that_a_person_cancelled_is_not_begun_again_and_again(instance: dg.DagsterInstance) -> None:
    run = begun(instance, at=time.time())
    instance.report_run_canceled(run)
    assert failures_for(instance, "cause") == 1
