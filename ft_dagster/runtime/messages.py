"""What a training tells the run that started it, through Dagster Pipes. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from dagster_pipes import PipesContext

WARNING = "warning"
"""Key of a sentence for the log of the run; what else is told are numbers, which the UI plots."""


def report(pipes: PipesContext, told: Mapping[str, Any]) -> None:
    """Pass on what a training tells: sentences to the log of the run, numbers as observations."""
    if WARNING in told:
        pipes.log.warning(str(told[WARNING]))
    if numbers := {name: value for name, value in told.items() if name != WARNING}:
        pipes.report_custom_message(numbers)
