"""Steps on a Ray cluster: dagster-ray's executor, extended so that a run ends in every case.

A step whose host is lost is started again on a remaining host. Any other failure of a step is final, as it is on one
machine. After a network partition, the process of a lost step may still be alive and report events. They are ignored,
because another process has taken over the step.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

import dagster as dg
from dagster import DagsterEvent, DagsterEventType
from dagster._core.events import StepRetryData  # private: no public event says that a step is started again
from dagster._core.execution.context.system import IStepContext  # private: argument of the method replaced below
from dagster._core.execution.plan.state import KnownExecutionState  # private: the same
from dagster._core.execution.retries import RetryMode  # private: StepDelegatingExecutor requires it
from dagster._core.executor.step_delegating import StepDelegatingExecutor  # private: what dagster-ray's executor is
from dagster._utils.error import SerializableErrorInfo  # private: argument of the method replaced below

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.executors.ray_steps import RaySteps

_LOOK_SECONDS = 5
_STARTS = 4
"""How often a step is started at most, if the hosts that run it are lost one after another."""


@dg.executor(name="ray", requirements=dg.multiple_process_executor_requirements())
def on_ray(context: dg.InitExecutorContext) -> "RayExecutor":
    """Run each step as a job of the Ray cluster at FT_RAY_ADDRESS."""
    return RayExecutor(RaySteps(load_settings()))


class RayExecutor(StepDelegatingExecutor):
    """Starts the steps of a run as Ray jobs, and follows them until they finish."""

    def __init__(self, steps: RaySteps) -> None:
        super().__init__(
            steps, RetryMode.ENABLED, check_step_health_interval_seconds=_LOOK_SECONDS, should_verify_step=True
        )
        self._steps = steps
        self._event_filter = EventFilter()

    def log_failure_or_retry_event_after_error(
        self, step_context: IStepContext, err_info: SerializableErrorInfo, known_state: KnownExecutionState
    ) -> DagsterEvent:
        step = step_context.step.key
        starts = known_state.get_retry_state().get_attempt_count(step) + 1
        if step in self._steps.lost and starts < _STARTS:
            return DagsterEvent.step_retry_event(step_context, StepRetryData(error=err_info))
        return super().log_failure_or_retry_event_after_error(step_context, err_info, known_state)

    def _pop_events(self, instance: dg.DagsterInstance, run_id: str, seen: set[int]) -> Sequence[DagsterEvent]:
        return list(self._event_filter.current(super()._pop_events(instance, run_id, seen)))


class EventFilter:
    """Drops events of processes that no longer own their step."""

    _ENDS = (
        DagsterEventType.STEP_SUCCESS,
        DagsterEventType.STEP_FAILURE,
        DagsterEventType.STEP_UP_FOR_RETRY,
        DagsterEventType.RESOURCE_INIT_FAILURE,
    )

    def __init__(self) -> None:
        self._under_way: dict[str, int | None] = {}
        """Step -> id of the process that runs it, or None until that process reports."""

    def current(self, events: Iterable[DagsterEvent]) -> Iterator[DagsterEvent]:
        """Yield the events of steps that have not finished, from the process that owns the step or from this one."""
        for event in events:
            if self._counts(event):
                yield event

    def _counts(self, event: DagsterEvent) -> bool:
        step, kind = event.step_key, event.event_type
        if step is None:
            return True
        if kind == DagsterEventType.STEP_WORKER_STARTING:
            self._under_way[step] = None
        elif kind == DagsterEventType.STEP_WORKER_STARTED and self._under_way.get(step, 0) is None:
            self._under_way[step] = event.pid
        ours = event.pid == os.getpid() or event.pid == self._under_way.get(step)
        if kind not in self._ENDS:
            return ours
        if not ours or step not in self._under_way:
            return False
        del self._under_way[step]
        return True
