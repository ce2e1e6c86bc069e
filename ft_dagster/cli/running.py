"""Bringing the graph up to date from a terminal: a run of the stale stages, with progress."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository  # private: a job that others can load
from dagster._core.execution.api import execute_run  # private: dg.execute_job takes no run id
from dagster._core.execution.execution_result import ExecutionResult  # private: what both ways of execution return
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ft_dagster.base.prepare import local_base, prepare_base
from ft_dagster.cli.summary import print_plan
from ft_dagster.config.settings import Settings
from ft_dagster.defs.assets.external import look, record
from ft_dagster.defs.automation.plan import Plan, make_plan
from ft_dagster.defs.runs.run_host import RUN_HOST_TAG, this_host
from ft_dagster.defs.runs.state import REASON_TAG, fail_abandoned, failure_message
from ft_dagster.defs.workspace import GPU_POOL, Workspace
from ft_dagster.training.request import PROGRESS

_ROUNDS = 5
_POLL_SECONDS = 0.5
_WAITING_SECONDS = 5.0
"""Time between two checks of which run has the device."""
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def bring_up_to_date(
    find_job: Callable[[], dg.JobDefinition], instance: dg.DagsterInstance, workspace: Workspace, console: Console
) -> bool:
    """Scan the reports and run what is planned, in one run. What changes during it is handled in another run.

    Args:
        find_job: returns the job of all stages; it is called only if something has to run.
        instance: the instance that the UI shows.
        workspace: the workspace to bring up to date.
        console: where the plan, the progress and errors are shown.

    Returns:
        True if everything is up to date afterwards. False if a stage failed, or if several runs have not been enough;
        the console then shows which.

    Raises:
        KeyboardInterrupt: a signal ended the run; its child processes have been stopped.
    """
    fail_abandoned(instance)  # a killed run would keep the slot of its device
    scan = look(workspace.settings)
    record(instance, scan, workspace.recipe)
    plan = make_plan(instance, workspace, scan)
    if plan.stages and _prepare_base(workspace, console):
        plan = make_plan(instance, workspace, scan)  # it can count tokens now instead of estimating them
    print_plan(plan, console)
    for _ in range(_ROUNDS):
        if plan.nothing_to_do:
            return True
        if not _run(plan, find_job(), instance, workspace.settings, console):
            return False
        scan = look(workspace.settings)
        record(instance, scan, workspace.recipe)
        plan = make_plan(instance, workspace, scan)
        if plan.stages:
            console.print("There is more to do: something changed during the run, or a result differs from the plan.")
            print_plan(plan, console)
    console.print(f"After {_ROUNDS} runs there is still something to do; see above.", style="red")
    return False


def _prepare_base(workspace: Workspace, console: Console) -> bool:
    """Fetch and convert an embedded base model that is not on this machine yet, and show progress.

    Steps that run on other machines prepare it there, and the hub client shows its own progress.

    Returns:
        Whether a base model was prepared.
    """
    settings, base = workspace.settings, workspace.recipe.base
    if settings.executor != "local" or base.source != "embedded" or local_base(base, settings.cache):
        return False
    with Progress(
        TextColumn("Base model {task.description}"),
        SpinnerColumn(finished_text="[green]✓[/]"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:

        def end_step() -> None:
            for task in progress.task_ids:
                progress.update(task, completed=1)

        def say(step: str) -> None:
            if console.is_terminal:
                end_step()
                progress.add_task(step, total=1)
            else:
                console.print(f"Base model: {step}", highlight=False, soft_wrap=True)

        prepare_base(base, settings.cache, say=say)
        end_step()
    return True


def _run(
    plan: Plan,
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    settings: Settings,
    console: Console,
) -> bool:
    run_id = str(uuid.uuid4())
    with _Follower(instance, run_id, settings, console):
        result = _execute(
            job,
            instance,
            settings,
            run_id=run_id,
            asset_selection=[dg.AssetKey(stage.stage) for stage in plan.stages],
            tags={REASON_TAG: f"{plan.stages[0].stage}: {plan.stages[0].reason}", RUN_HOST_TAG: str(this_host())},
            run_config=_QUIET,
        )
    if not result.success:
        if _was_interrupted(result):
            raise KeyboardInterrupt
        _print_failures(result, console)
    else:
        _print_checks(result, console)
    return bool(result.success)


def _execute(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    settings: Settings,
    *,
    run_id: str,
    asset_selection: list[dg.AssetKey],
    tags: dict[str, str],
    run_config: dict[str, Any],
) -> ExecutionResult:
    """Execute one run: in this process, or with its steps where FT_EXECUTOR says, followed from here."""
    if settings.executor == "local":
        return job.execute_in_process(
            instance=instance,
            run_id=run_id,
            asset_selection=asset_selection,
            tags=tags,
            run_config=run_config,
            raise_on_error=False,
        )
    reachable = ReconstructableRepository.for_module("ft_dagster.definitions", "defs").get_reconstructable_job(job.name)
    run = instance.create_run_for_job(
        reachable.get_definition(),
        run_id=run_id,
        asset_selection=frozenset(asset_selection),
        tags={**job.run_tags, **tags},
        run_config=run_config,
        job_code_origin=reachable.get_python_origin(),
    )
    try:
        return execute_run(reachable, run, instance)
    finally:  # frees slots of interrupted steps: the cluster assigns the devices, and there may be no daemon
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _was_interrupted(result: ExecutionResult) -> bool:
    errors = [event.job_failure_data.error for event in result.all_events if event.is_job_failure]
    return any(error is not None and error.cls_name == "DagsterExecutionInterruptedError" for error in errors)


def _print_checks(result: ExecutionResult, console: Console) -> None:
    """Print the checks that did not pass, including those that only warn."""
    for check in result.get_asset_check_evaluations():
        if not check.passed:
            warns = check.severity == dg.AssetCheckSeverity.WARN
            style, says = ("bold yellow", "warns") if warns else ("bold red", "failed")
            console.print(f"[{style}]{check.asset_key.to_user_string()}: {check.check_name} {says}.[/]")
            console.print(check.description or "", highlight=False, soft_wrap=True, markup=False)


def _print_failures(result: ExecutionResult, console: Console) -> None:
    _print_checks(result, console)
    steps = result.get_step_failure_events()
    for event in steps or [event for event in result.all_events if event.is_job_failure]:
        error = event.step_failure_data.error if event.is_step_failure else None
        if error is None or error.cls_name != "DagsterAssetCheckFailedError":  # printed above
            console.print(failure_message(event), highlight=False, soft_wrap=True, markup=False, style="red")


class _Follower:
    """Shows in its own thread which stage runs and how far training has come, until the run has finished."""

    def __init__(self, instance: dg.DagsterInstance, run_id: str, settings: Settings, console: Console) -> None:
        self._instance = instance
        self._run_id = run_id
        self._attempts = settings.state / "attempts"
        self._ended = threading.Event()
        self._warned: set[str] = set()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._progress.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._progress.stop()

    def _follow(self) -> None:
        tasks: dict[str, TaskID] = {}
        cursor: str | None = None
        looked = time.monotonic()
        while True:
            ended = self._ended.wait(_POLL_SECONDS)
            if time.monotonic() - looked > _WAITING_SECONDS:
                self._show_waiting(tasks)
                looked = time.monotonic()
            records, cursor = self._new_events(cursor)
            for entry in records:
                event = entry.event_log_entry.dagster_event
                if event is None or event.step_key is None:
                    continue
                step = event.step_key
                if event.event_type == dg.DagsterEventType.STEP_WORKER_STARTING and step not in tasks:
                    tasks[step] = self._progress.add_task(step, total=None, note="waiting for resources")
                elif event.is_step_start and step not in tasks:
                    tasks[step] = self._progress.add_task(step, total=None, note="")
                elif event.is_step_start:
                    self._progress.update(tasks[step], note="")
                elif step in tasks and (event.is_step_success or event.is_step_failure):
                    mark = "[green]✓[/]" if event.is_step_success else "[red]✗[/]"
                    self._progress.update(tasks[step], total=1, completed=1, description=f"{mark} {step}")
            if trains := [name for name in ("released_adapter", "lora_adapter") if name in tasks]:
                self._show_training(tasks[trains[0]])  # releasing trains, too, if the recipe refits
            if ended:
                return

    def _new_events(self, cursor: str | None) -> tuple[Sequence[dg.EventLogRecord], str | None]:
        """Return the events recorded since the cursor, or none while the history does not answer. The run continues."""
        try:
            found = self._instance.get_records_for_run(self._run_id, cursor=cursor)
        except Exception:  # an error of the database client, see child_process.py
            return [], cursor
        return found.records, found.cursor

    def _show_waiting(self, tasks: dict[str, TaskID]) -> None:
        """Print which run has the device that this run waits for, and free it if that run was killed."""
        try:
            pool = self._instance.event_log_storage.get_concurrency_info(GPU_POOL)
            waiting = [
                step.step_key
                for step in pool.pending_steps
                if step.run_id == self._run_id and step.assigned_timestamp is None
            ]
            if waiting:
                fail_abandoned(self._instance)  # there may be no daemon to do it
        except Exception:  # an error of the database client, as above
            return
        for step in waiting:
            if step not in tasks:
                others = ", ".join(sorted(run[:8] for run in pool.active_run_ids))
                self._progress.console.print(f"{step} waits for the device, which run {others} has.", highlight=False)
                tasks[step] = self._progress.add_task(step, total=None, note="waiting")

    def _show_training(self, task: TaskID) -> None:
        for path in self._attempts.glob(f"*/*/{PROGRESS}"):
            content = _read(path)
            if content.get("run") == self._run_id and content["step"] < content["steps"]:
                if (warning := content.get("warning")) and warning not in self._warned:
                    self._warned.add(warning)
                    self._progress.console.print(warning, style="yellow", highlight=False, soft_wrap=True)
                loss = f"loss {content['loss']:.3f}" if "loss" in content else ""
                self._progress.update(task, total=content["steps"], completed=content["step"], note=loss)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:  # training has just finished and its attempt was committed
        return {}
