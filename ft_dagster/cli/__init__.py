"""The command `ft-dagster`: the graph from a terminal, on the same Dagster instance as the UI."""

import gc
import os
import signal
import sys
import warnings
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ft_dagster import __version__
from ft_dagster.cli.common import FAILED, SOMETHING_TO_DO, Json, errors_said, print_json
from ft_dagster.cli.doctor import doctor
from ft_dagster.cli.lineage import lineage
from ft_dagster.cli.recipe import recipe
from ft_dagster.cli.release import release
from ft_dagster.cli.talk import chat, generate, serve
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.corpus.example import fill_with_example
from ft_dagster.corpus.files import find_reports, require_reports
from ft_dagster.evaluation.eval_sets import load_eval_sets
from ft_dagster.release.released import Releases
from ft_dagster.release.tracking import track
from ft_dagster.store.shared import open_store

if TYPE_CHECKING:
    import dagster as dg

app = typer.Typer(
    help="Keeps a fine-tuned model as fresh as the reports it learned from. Works on the workspace that "
    "FT_WORKSPACE names, or on the current folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(release, name="release")
app.add_typer(lineage, name="lineage")
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(recipe)
app.command()(doctor)


_DEPLOYMENT_VARIABLES = {"DAGSTER_HOME", "DAGSTER_POSTGRES_HOST", "FT_STORE", "MLFLOW_TRACKING_URI"}
"""Variables that name a history, a store or a server that others may use. A demo ignores them."""


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
    """Options of `ft-dagster` itself."""
    gc.disable()  # most of a short command is importing libraries, which makes nothing to collect


@app.command()
def plan(as_json: Json = False) -> None:
    """Show what `ft-dagster run` would do now, and why, without changing anything.

    Exit codes: 0 nothing to do; 2 something to do; 1 the reports, the recipe or the base model cannot be used.
    """
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        _refuse_early(settings)
        from ft_dagster.cli.summary import print_plan
        from ft_dagster.defs.automation.plan import make_plan
        from ft_dagster.defs.instance import instance_to_read
        from ft_dagster.defs.workspace import Workspace

        with instance_to_read(settings) as instance:
            found = make_plan(instance, Workspace())
    if as_json:
        print_json(found.to_json())
    else:
        print_plan(found, Console())
        if not found.nothing_to_do:
            typer.echo("`ft-dagster run` does this.")
    raise typer.Exit(0 if found.nothing_to_do else SOMETHING_TO_DO)


@app.command()
def run(as_json: Json = False) -> None:
    """Bring everything up to date now: read, tokenize, train, evaluate and release, as far as content has changed.

    Exit codes: 0 done, or nothing to do; 1 a stage failed, or the reports, the recipe or the base model cannot be
    used; 130 interrupted (training saves a checkpoint, and continues from it the next time).
    """
    console = Console(stderr=True)
    with errors_said(console):
        _run(console, as_json)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(help="The workspace. Default: FT_WORKSPACE if set, otherwise demo/ in the current folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fill a workspace with the example report that comes with ft_dagster, and do there what `ft-dagster run` does.

    At the end it shows the held-out bits per byte of base and adapter, and where the adapter is. When run again, it
    brings what you edited up to date. It refuses a workspace that contains other reports. Exit codes: those of
    `ft-dagster run`.
    """
    console = Console(stderr=True)
    with errors_said(console):
        workspace = folder or Path(os.environ.get("FT_WORKSPACE") or "demo")
        os.environ["FT_WORKSPACE"] = str(workspace.expanduser().absolute())
        for name in _DEPLOYMENT_VARIABLES & os.environ.keys():
            console.print(f"{name} is not used: the demo keeps everything in its workspace.", style="dim")
            del os.environ[name]
        settings = load_settings()
        copied = fill_with_example(settings.workspace)
        there = f"filled with the example report, {copied} files" if copied else "the example report is there already"
        console.print(f"Workspace {settings.workspace}: {there}", highlight=False, soft_wrap=True, markup=False)
        _run(console, as_json)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Show what in the store no kept adapter was made from, and remove it if you confirm.

    Kept are the adapters made last (FT_KEEP_ADAPTERS, 5), every adapter ever released (FT_KEEP_RELEASED), and
    everything that these were made from. With FT_KEEP_RUNS, older runs are removed from Dagster's history as well.
    Exit codes: 0 removed, or shown; 1 a run uses the store, or something that is kept is damaged.
    """
    console = Console(stderr=True)
    with errors_said(console):
        settings = load_settings()
        from ft_dagster.cli.summary import print_removable
        from ft_dagster.defs.clean import find_removable
        from ft_dagster.defs.instance import has_instance, instance_to_read
        from ft_dagster.defs.stages import RAW_CHAPTERS
        from ft_dagster.defs.workspace import Workspace

        workspace = Workspace()
        if not has_instance(settings) and workspace.store.newest(RAW_CHAPTERS.name):
            raise SettingsError(
                f"There is no Dagster history in {settings.dagster_home}, so it is unknown what is in use. Set "
                "DAGSTER_HOME to that of your deployment."
            )
        with instance_to_read(settings) as instance:
            found = find_removable(instance, workspace)
            print_removable(found, console)
            rows = found.to_json()
            if found and (yes or (sys.stdin.isatty() and typer.confirm("Remove them?", err=True))):
                with workspace.store.cleaning():
                    found = find_removable(instance, workspace)  # a run may have finished since
                    rows = found.to_json()
                    found.remove(instance)
                console.print("Removed.")
    if as_json:
        print_json(rows)


@app.command("track")
def track_releases(as_json: Json = False) -> None:
    """Report to the MLflow server of MLFLOW_TRACKING_URI what it does not know yet. A run does so automatically."""
    console = Console(stderr=True)
    with errors_said(console):
        settings = load_settings()
        releases = Releases(settings.fine_tuned_model, settings.state)
        tracked = track(settings, open_store(settings), releases)
        if tracked is None:
            raise SettingsError("MLFLOW_TRACKING_URI is not set. Name an MLflow server there, or in .env.")
    if as_json:
        print_json(asdict(tracked))
    else:
        for done, keys in (("Reported", tracked.adapters), ("Registered", tracked.versions)):
            typer.echo(f"{done}: {', '.join(key[:12] for key in keys) or 'nothing new'}")


def _run(console: Console, as_json: bool) -> None:
    settings = load_settings()
    _refuse_early(settings)
    succeeded, summary = _bring_up_to_date(settings, console)
    if not succeeded:
        raise typer.Exit(FAILED)
    if as_json:
        print_json(summary)


def _refuse_early(settings: Settings) -> None:
    """Raise the errors that can be found without Dagster, before anything is made."""
    require_reports(settings.workspace, len(list(islice(find_reports(settings.workspace), 1))))
    recipe = load_recipe(settings.recipe, settings.workspace)
    load_eval_sets(recipe.evaluation, settings.workspace, instruct=True)


def _bring_up_to_date(settings: Settings, console: Console) -> tuple[bool, dict[str, object]]:
    from dagster_shared.utils.warnings import PreviewWarning

    from ft_dagster.cli.running import bring_up_to_date
    from ft_dagster.cli.summary import print_summary, summarize
    from ft_dagster.defs.instance import open_instance
    from ft_dagster.defs.workspace import Workspace

    gc.freeze()
    gc.enable()  # a run may last for hours
    warnings.filterwarnings("ignore", category=PreviewWarning)  # from Dagster's own use of its Pipes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: children are stopped, work is kept
    with open_instance(settings) as instance:
        succeeded = bring_up_to_date(_find_job, instance, Workspace(), console)
        if not succeeded:
            return False, {}
        summary = summarize(instance, settings)
        print_summary(summary, console)
        return True, summary


def _find_job() -> "dg.JobDefinition":
    """Import the job. Called only if there is something to run: the import takes as long as a run of nothing does."""
    from ft_dagster.definitions import defs
    from ft_dagster.defs.automation.sensor import BRING_UP_TO_DATE

    return defs.resolve_job_def(BRING_UP_TO_DATE)
