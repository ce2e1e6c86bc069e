"""All that `dagster dev` loads, put together in one place."""

import dagster as dg

from ft_dagster.defs.adapter_evaluation import adapter_evaluation
from ft_dagster.defs.automation import (
    bring_up_to_date_job,
    keep_up_to_date,
    report_failures,
    scheduled_retraining,
)
from ft_dagster.defs.child_process import ChildProcess
from ft_dagster.defs.executors import executor_for
from ft_dagster.defs.external import base_model, report_files
from ft_dagster.defs.freshness import keeps_up_with_reports
from ft_dagster.defs.lora_adapter import lora_adapter
from ft_dagster.defs.raw_chapters import raw_chapters
from ft_dagster.defs.released_adapter import released_adapter
from ft_dagster.defs.sections import sections
from ft_dagster.defs.tokenized_dataset import tokenized_dataset
from ft_dagster.defs.workspace import Workspace
from ft_dagster.settings import load_settings

defs = dg.Definitions(
    assets=[
        report_files,
        base_model,
        raw_chapters,
        sections,
        tokenized_dataset,
        lora_adapter,
        adapter_evaluation,
        released_adapter,
    ],
    asset_checks=[keeps_up_with_reports],
    jobs=[bring_up_to_date_job],
    sensors=[keep_up_to_date, report_failures],
    schedules=[scheduled_retraining],
    resources={"workspace": Workspace(), "child_process": ChildProcess()},
    executor=executor_for(load_settings()),
)
