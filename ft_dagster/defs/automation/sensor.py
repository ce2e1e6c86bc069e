"""The sensor and the schedule that keep the graph up to date automatically.

Both compare states rather than follow events: what the stages were made from, and what their inputs are now. Nothing
is remembered between ticks that the next tick could not find out again, so a lost tick, a killed daemon or a change
during a run costs only time. One run brings all stale stages up to date. Where little text changed, the plan knows
beforehand which stages will find their inputs unchanged, and leaves them out.
"""

from contextlib import suppress
from datetime import UTC, datetime

import dagster as dg

from ft_dagster.config.redaction import keeping_secrets
from ft_dagster.config.settings import Settings, load_settings
from ft_dagster.corpus.files import require_reports
from ft_dagster.corpus.index import changed_since
from ft_dagster.defs.assets.external import look, record
from ft_dagster.defs.automation.freshness import report_freshness
from ft_dagster.defs.automation.plan import make_plan
from ft_dagster.defs.runs.state import (
    BRING_UP_TO_DATE,
    CAUSE_TAG,
    REASON_TAG,
    SCHEDULE,
    SENSOR,
    cancelled_for,
    fail_abandoned,
    failure_message,
    failures_for,
    seconds_since_automatic,
    under_way,
)
from ft_dagster.defs.stages import BLOCKED, cause_of, stale_stages
from ft_dagster.defs.workspace import Workspace
from ft_dagster.errors import UserError
from ft_dagster.evaluation.eval_sets import load_eval_sets

_RUNS_PER_CAUSE = 2
"""After a failed run, one more is started for the same cause. After that, only another cause or a person starts one."""
_NIGHTLY = "0 3 * * *"

bring_up_to_date_job = dg.define_asset_job(
    BRING_UP_TO_DATE,
    selection=dg.AssetSelection.all(),
    description="All stages, in order. A stage whose inputs have not changed costs nothing.",
)


def decide(instance: dg.DagsterInstance, settings: Settings, workspace: Workspace) -> dg.RunRequest | dg.SkipReason:
    """Return a request for a run of the stages that are due, with the reason; or the reason why no run is due."""
    try:
        return _decide(instance, settings, workspace)
    except UserError as error:
        return dg.SkipReason(str(error))


def _decide(instance: dg.DagsterInstance, settings: Settings, workspace: Workspace) -> dg.RunRequest | dg.SkipReason:
    recipe = workspace.recipe
    load_eval_sets(recipe.evaluation, settings.workspace, instruct=True)  # raise now, not after a training
    scan = look(settings)
    require_reports(settings.workspace, len(scan.files) + len(scan.unreadable))
    if changed_since(scan, settings.settle_seconds):
        return dg.SkipReason(f"Reports changed within the last {settings.settle_seconds:g} s; somebody may be writing.")
    record(instance, scan, recipe)
    fail_abandoned(instance)
    if running := under_way(instance):
        return dg.SkipReason(f"Run {running[0].run_id[:8]} is under way; changes made meanwhile are handled after it.")
    stale = stale_stages(instance, workspace)
    if not stale:
        return dg.SkipReason("Everything is up to date.")
    first, reason = stale[0]
    if reason == BLOCKED:
        return dg.SkipReason(f"Held back: a blocking check of {first.name} failed, and its inputs have not changed.")
    cause = cause_of(instance, recipe)
    if run := cancelled_for(instance, cause):
        return dg.SkipReason(
            f"{first.name} is stale ({reason}), but run {run.run_id[:8]} for this content was canceled. It starts "
            "again when something changes, or when you run `ft-dagster run` or materialize it in the UI."
        )
    failed = failures_for(instance, cause)
    if failed >= _RUNS_PER_CAUSE:
        return dg.SkipReason(
            f"{first.name} is stale ({reason}), but {failed} runs for this content failed. It runs again when "
            "something changes, or when you run `ft-dagster run` or materialize it in the UI."
        )
    since = seconds_since_automatic(instance)
    if since is not None and since < settings.minimum_interval_seconds:
        return dg.SkipReason(
            f"The last automatic run was {since:.0f} s ago; the minimum interval is "
            f"{settings.minimum_interval_seconds:g} s."
        )
    return dg.RunRequest(
        asset_selection=[dg.AssetKey(stage.stage) for stage in make_plan(instance, workspace, scan, cost=False).stages],
        tags={CAUSE_TAG: cause, REASON_TAG: f"{first.name}: {reason}"},
    )


@dg.sensor(
    name=SENSOR,
    job=bring_up_to_date_job,
    minimum_interval_seconds=load_settings().watch_seconds,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Watches the report folders. When their content, the recipe, the base model or the code has changed, "
    "one run brings everything up to date.",
)
@keeping_secrets
def keep_up_to_date(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.RunRequest | dg.SkipReason:
    decision = decide(context.instance, workspace.settings, workspace)
    with suppress(UserError):  # the decision reports it
        report_freshness(context.instance, workspace)
    return decision


@dg.schedule(
    name=SCHEDULE,
    job=bring_up_to_date_job,
    cron_schedule=load_settings().schedule or _NIGHTLY,
    default_status=dg.DefaultScheduleStatus.RUNNING if load_settings().schedule else dg.DefaultScheduleStatus.STOPPED,
    description="Runs the stale stages at fixed times (FT_SCHEDULE). While nothing is stale, it starts no run.",
)
@keeping_secrets
def scheduled_retraining(context: dg.ScheduleEvaluationContext, workspace: Workspace) -> dg.RunRequest | dg.SkipReason:
    return decide(context.instance, workspace.settings, workspace)


@dg.run_failure_sensor(
    name="report_failures",
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Writes one line for each failed run to logs/failures.log of the workspace.",
)
@keeping_secrets
def report_failures(context: dg.RunFailureSensorContext) -> None:
    failures = [failure_message(event) for event in context.get_step_failure_events()]
    message = "; ".join(failures) or context.failure_event.message or "failed"
    line = f"{datetime.now(UTC).isoformat(timespec='seconds')} run {context.dagster_run.run_id}: {message}"
    path = load_settings().logs / "failures.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(" ".join(line.split()) + "\n")
    context.log.error(line)
