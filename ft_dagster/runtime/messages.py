"""What a training reports to the run that started it, through Dagster Pipes. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from dagster_pipes import PipesContext

WARNING = "warning"
"""Key of a sentence for the log of the run; the other keys are numbers, which the UI plots."""


def report_to_run(pipes: PipesContext, metrics: Mapping[str, Any]) -> None:
    """Report metrics to the run: the sentence goes to its log, and numbers become observations."""
    if WARNING in metrics:
        pipes.log.warning(str(metrics[WARNING]))
    if numbers := {name: value for name, value in metrics.items() if name != WARNING}:
        pipes.report_custom_message(numbers)
