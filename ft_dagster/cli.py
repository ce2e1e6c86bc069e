"""`ft-dagster`: the graph from a terminal, on the same Dagster instance as the UI."""

import json
import signal
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from ft_dagster import __version__
from ft_dagster.base import BaseModelError
from ft_dagster.corpus.files import CorpusError, require_reports
from ft_dagster.recipe import RecipeError, load_recipe
from ft_dagster.settings import Settings, SettingsError, load_settings
from ft_dagster.store import StoreError

app = typer.Typer(
    help="Keeps a fine-tuned model as fresh as the reports it learned from. Works on the workspace that "
    "FT_WORKSPACE names, or on the current folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_BAD_INPUT = (CorpusError, RecipeError, BaseModelError, StoreError, SettingsError, OSError)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ft_dagster {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What every command has."""


@app.command()
def run(
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")] = False,
) -> None:
    """Bring everything up to date now: read, tokenize, train, evaluate, release, as far as content changed.

    Exit codes: 0 done, or nothing to do; 1 a stage failed; 2 the reports, the recipe or the base model cannot be
    used; 130 interrupted (training saves a checkpoint and goes on from it next time).
    """
    console = Console(stderr=True)
    try:
        settings = load_settings()
        require_reports(settings.workspace)
        load_recipe(settings.recipe, settings.workspace)  # refused before anything is made
        succeeded, summary = _bring_up_to_date(settings, console)
    except _BAD_INPUT as error:
        console.print(f"{type(error).__name__}: {error}", highlight=False, soft_wrap=True, markup=False, style="red")
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        console.print("Interrupted. What was finished is kept; training goes on from its last checkpoint.")
        raise typer.Exit(INTERRUPTED) from None
    if not succeeded:
        raise typer.Exit(FAILED)
    if as_json:
        json.dump(summary, sys.stdout, indent=1, ensure_ascii=False)
        typer.echo()


def _bring_up_to_date(settings: Settings, console: Console) -> tuple[bool, dict[str, object]]:
    from dagster_shared.utils.warnings import PreviewWarning

    from ft_dagster.definitions import defs
    from ft_dagster.defs.automation import BRING_UP_TO_DATE
    from ft_dagster.defs.instance import open_instance
    from ft_dagster.defs.running import bring_up_to_date
    from ft_dagster.defs.summary import print_summary, summarize
    from ft_dagster.defs.workspace import Workspace

    warnings.filterwarnings("ignore", category=PreviewWarning)  # of Dagster's own use of its Pipes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: children are stopped, work is kept
    with open_instance(settings) as instance:
        job = defs.resolve_job_def(BRING_UP_TO_DATE)
        succeeded = bring_up_to_date(job, instance, Workspace(), console)
        if not succeeded:
            return False, {}
        summary = summarize(instance, settings)
        print_summary(summary, console)
        return True, summary


if __name__ == "__main__":
    app()
