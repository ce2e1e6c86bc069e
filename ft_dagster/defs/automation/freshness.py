"""A check that is red in the UI while the released adapter has been behind the reports for too long.

Dagster's freshness policies are not used for it: they count from the last materialization, so they turn red when
nothing has changed for a while, which is when nothing has to run.
"""

import time

import dagster as dg

from ft_dagster.config.redaction import keeping_secrets
from ft_dagster.defs.runs.state import BRING_UP_TO_DATE
from ft_dagster.defs.stages import RAW_CHAPTERS, RELEASED_ADAPTER, REPORT_FILES, stale_stages, version_of
from ft_dagster.defs.workspace import Workspace

_DESCRIPTION = (
    "The released adapter has not been behind the reports for longer than FT_LAG_SECONDS. The check is evaluated with "
    "every release, and by the sensor whenever its result changes."
)


@dg.asset_check(asset=RELEASED_ADAPTER.key, name="keeps_up_with_reports", description=_DESCRIPTION)
@keeping_secrets
def keeps_up_with_reports(context: dg.AssetCheckExecutionContext, workspace: Workspace) -> dg.AssetCheckResult:
    return _result(seconds_behind(context.instance, workspace), workspace.settings.lag_seconds)


def report_freshness(instance: dg.DagsterInstance, workspace: Workspace) -> None:
    """Record the check's result if it differs from the last one."""
    result = _result(seconds_behind(instance, workspace), workspace.settings.lag_seconds)
    key = dg.AssetCheckKey(RELEASED_ADAPTER.key, "keeps_up_with_reports")
    last = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
    evaluation = last.evaluation if last else None  # a run that failed early has only planned it
    passed_before = evaluation.passed if isinstance(evaluation, dg.AssetCheckEvaluation) else True
    if passed_before != result.passed:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key.asset_key,
                check_name=key.name,
                passed=result.passed,
                severity=result.severity,
                metadata=result.metadata,
                description=result.description,
            )
        )


def seconds_behind(instance: dg.DagsterInstance, workspace: Workspace) -> float:
    """Return for how many seconds the release has been out of date; 0 while it reflects the current reports."""
    if not stale_stages(instance, workspace):
        return 0.0
    last = _last_up_to_date(instance)
    since = dg.AssetRecordsFilter(REPORT_FILES, after_timestamp=last.start_time or 0.0 if last else 0.0)
    recorded = instance.fetch_materializations(since, limit=2, ascending=True).records
    # Where nothing had scanned the reports before the run, the version that it read was recorded during the run.
    read = _read_by(instance, last) if last else None
    changes = [record for record in recorded if version_of(record.asset_materialization) != read]
    return max(0.0, time.time() - changes[0].timestamp) if changes else 0.0


def _last_up_to_date(instance: dg.DagsterInstance) -> dg.RunRecord | None:
    """Return the last run after which everything was up to date, as far as is known."""
    succeeded = dg.RunsFilter(job_name=BRING_UP_TO_DATE, statuses=[dg.DagsterRunStatus.SUCCESS])
    runs = list(instance.get_run_records(succeeded, limit=1))
    for record in instance.fetch_materializations(RELEASED_ADAPTER.key, limit=1).records:
        made_by = instance.get_run_record_by_id(record.run_id)
        runs += [made_by] if made_by else []
    return max(runs, key=lambda run: run.start_time or 0.0, default=None)


def _read_by(instance: dg.DagsterInstance, run: dg.RunRecord) -> str | None:
    """Return the data version of the report files that a run read."""
    before = dg.AssetRecordsFilter(RAW_CHAPTERS.key, before_timestamp=run.end_time)
    found = instance.fetch_materializations(before, limit=1).records
    return version_of(found[0].asset_materialization) if found else None


def _result(behind: float, most: float) -> dg.AssetCheckResult:
    late = behind > most
    return dg.AssetCheckResult(
        check_name="keeps_up_with_reports",
        asset_key=RELEASED_ADAPTER.key,
        passed=not late,
        severity=dg.AssetCheckSeverity.ERROR,
        metadata={"seconds behind": round(behind, 1), "at most": most},
        description=f"The reports changed {behind / 60:.0f} min ago, and no released adapter reflects them yet."
        if late
        else None,
    )
