"""The state of runs: which are under way, which were abandoned, and how often a change was tried."""

import os
import time
from collections.abc import Sequence

import dagster as dg
import psutil

from ft_dagster.defs.runs.disk import disk_advice
from ft_dagster.defs.runs.run_host import host_of, this_host

BRING_UP_TO_DATE = "bring_up_to_date"
"""The job that contains all stages."""
SENSOR, SCHEDULE = "keep_up_to_date", "scheduled_retraining"
"""Names of the sensor and the schedule, which request automatic runs."""
CAUSE_TAG = "ft_dagster/cause"
"""Tag of an automatic run: a hash of everything that decides its outcome."""
REASON_TAG = "ft_dagster/reason"
_RESTART_TAG = "ft_dagster/ended_by_a_restart"
"""Tag of an abandoned run that started before the process that found it: it ended with the machine or with Dagster."""
_UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_INTERRUPTED = dg.DagsterExecutionInterruptedError.__name__


def under_way(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Return the runs that have not finished."""
    return list(instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY)))


def fail_abandoned(instance: dg.DagsterInstance) -> list[str]:
    """Mark the runs as failed whose processes are gone (a power cut, the OOM killer): they would block others forever.

    Runs that cannot be judged from here are left alone: those on another machine, unless Slurm restarted the job here,
    and those whose launcher monitors them.

    Returns:
        The ids of the runs that were marked as failed.
    """
    abandoned = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        run, started = record.dagster_run, record.start_time or 0.0
        if reason := _why_gone(instance, run, started):
            if started < psutil.Process(os.getpid()).create_time():
                instance.add_run_tags(run.run_id, {_RESTART_TAG: "yes"})
            instance.report_run_failed(run, reason)
            if instance.event_log_storage.supports_global_concurrency_limits:  # there may be no daemon that does it
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            abandoned.append(run.run_id)
    return abandoned


def _why_gone(instance: dg.DagsterInstance, run: dg.DagsterRun, started: float) -> str | None:
    place = host_of(run)
    if place and place.was_given_up_for(this_host()):
        return f"Slurm has given up this run on {place.host} and restarted job {place.job}."
    if place.host != this_host().host if place else instance.run_launcher.supports_check_run_worker_health:
        return None
    processes = _processes_of(instance, run.run_id)
    if processes and not any(_is_alive(process, started) for process in processes):
        return "The process of this run is gone; it was killed, or the machine stopped."
    return None


def _processes_of(instance: dg.DagsterInstance, run_id: str) -> set[int]:
    """Return the ids of the processes that have executed the run, as the metadata of its engine events names them.

    Dagster records them from the start of the process on. A tag of ours would be written with the first step, and a
    run that was killed before that would never be recognized.
    """
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    found = [event.dagster_event.engine_event_data.metadata.get("pid") for event in events if event.dagster_event]
    return {int(str(pid.value)) for pid in found if pid is not None}


def has_ended(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether the instance says that a run has finished, for example because another machine marked it as failed."""
    run = instance.get_run_by_id(run_id)
    return run is not None and run.is_finished


def _is_alive(pid: int, run_started: float) -> bool:
    """Whether the process is alive, and not a later one that got the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= run_started + 1.0
    except psutil.NoSuchProcess:
        return False


def failures_for(instance: dg.DagsterInstance, cause: str) -> int:
    """Return how many automatic runs for this cause have failed.

    Runs that ended with Dagster itself, by Ctrl-C or with the machine, do not count: their content may be fine. Runs
    before the last successful one do not count either: the obstacle may be gone.
    """
    failed = _since_last_success(instance, cause, dg.DagsterRunStatus.FAILURE)
    return sum(not _was_interrupted(instance, run) for run in failed)


def cancelled_for(instance: dg.DagsterInstance, cause: str) -> dg.DagsterRun | None:
    """Return the last automatic run for this cause that a person cancelled, unless a run has succeeded since."""
    return next(iter(_since_last_success(instance, cause, dg.DagsterRunStatus.CANCELED)), None)


def _since_last_success(
    instance: dg.DagsterInstance, cause: str, status: dg.DagsterRunStatus
) -> Sequence[dg.DagsterRun]:
    succeeded = dg.RunsFilter(job_name=BRING_UP_TO_DATE, statuses=[dg.DagsterRunStatus.SUCCESS])
    last = instance.get_run_records(succeeded, limit=1)
    since = last[0].create_timestamp if last else None
    return instance.get_runs(dg.RunsFilter(statuses=[status], tags={CAUSE_TAG: cause}, created_after=since))


def _was_interrupted(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    if _RESTART_TAG in run.tags or _never_began(instance, run):
        return True
    failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    errors = [event.dagster_event.step_failure_data.error for event in failures if event.dagster_event]
    return any(error is not None and error.cls_name == _INTERRUPTED for error in errors)


def _never_began(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether Dagster stopped while the run was being launched, so that the next Dagster marked it as failed.

    A run that was requested since this process started is no such run: something prevents it from starting.
    """
    record = instance.get_run_record_by_id(run.run_id)
    if record is None or record.start_time is not None:
        return False
    return record.create_timestamp.timestamp() < psutil.Process(os.getpid()).create_time()


def seconds_since_automatic(instance: dg.DagsterInstance) -> float | None:
    """Return the seconds since the sensor or the schedule last requested a run; None if neither has."""
    created = [
        record.create_timestamp.timestamp()
        for tags in ({"dagster/sensor_name": SENSOR}, {"dagster/schedule_name": SCHEDULE})
        for record in instance.get_run_records(dg.RunsFilter(tags=tags), limit=1)
    ]
    return time.time() - max(created) if created else None


def failure_message(event: dg.DagsterEvent) -> str:
    """Return which step failed and why, or why the run failed before any step, without Dagster's own frames."""
    if event.is_step_failure:
        failure = event.step_failure_data
        given = failure.user_failure_data.description if failure.user_failure_data else None
        subject, error = f"{event.step_key} failed", failure.error
    else:
        subject, given, error = "The run failed", None, event.job_failure_data.error
    while error is not None and error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause  # the cause of one of our errors says less than the error
    said = (given or (error.message if error else event.message) or "no message").strip()
    advice = disk_advice(said)
    return f"{subject}: {said}" + (f"\n{advice}" if advice else "")
