"""The definitions that `dagster dev` loads: assets, checks, jobs, sensors, schedules, resources and the executor."""

import dagster as dg

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.assets.adapter_evaluation import adapter_evaluation
from ft_dagster.defs.assets.external import base_model, report_files
from ft_dagster.defs.assets.lora_adapter import lora_adapter
from ft_dagster.defs.assets.raw_chapters import raw_chapters
from ft_dagster.defs.assets.released_adapter import released_adapter_asset
from ft_dagster.defs.assets.sections import sections
from ft_dagster.defs.assets.tokenized_dataset import tokenized_dataset
from ft_dagster.defs.automation.freshness import keeps_up_with_reports
from ft_dagster.defs.automation.sensor import (
    bring_up_to_date_job,
    keep_up_to_date,
    report_failures,
    scheduled_retraining,
)
from ft_dagster.defs.executors.choice import executor_for
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.workspace import GPU_POOL, Workspace
from ft_dagster.errors import UserError


def _refits() -> bool:
    """Whether the release trains. Each step names what is wrong with a recipe that cannot be read."""
    try:
        return Workspace().recipe.release.refit
    except UserError:
        return False


defs = dg.Definitions(
    assets=[
        report_files,
        base_model,
        raw_chapters,
        sections,
        tokenized_dataset,
        lora_adapter,
        adapter_evaluation,
        released_adapter_asset(GPU_POOL if _refits() else None),
    ],
    asset_checks=[keeps_up_with_reports],
    jobs=[bring_up_to_date_job],
    sensors=[keep_up_to_date, report_failures],
    schedules=[scheduled_retraining],
    resources={"workspace": Workspace(), "child_process": ChildProcess()},
    executor=executor_for(load_settings()),
)
