"""`ft-dagster release`: which adapter is in use, which ones were, and who decided it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ft_dagster.cli.common import Json, errors_said, print_json
from ft_dagster.config.settings import SettingsError, load_settings
from ft_dagster.evaluation.request import KIND as EVALUATION
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.export import GGUF_TYPES, export_merged
from ft_dagster.release.lineage import release_history
from ft_dagster.release.publish import CARD, model_card, publish, published_files
from ft_dagster.release.released import Releases, adapter_folder
from ft_dagster.release.tracking import TrackingError, track
from ft_dagster.store.shared import open_store

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from ft_dagster.defs.workspace import Workspace

release = typer.Typer(
    help="The released adapter: its history, releases by hand, export and publication.", no_args_is_help=True
)
Why = Annotated[str, typer.Option("--why", help="The reason, which the history keeps.")]


@release.command("list")
def list_releases(as_json: Json = False) -> None:
    """List every release, oldest first, and which adapter is in use."""
    console = Console(stderr=True)
    with errors_said(console):
        settings = load_settings()
        rows = release_history(Releases(settings.fine_tuned_model, settings.state), open_store(settings))
    if as_json:
        print_json(rows)
    else:
        _print_releases(rows, Console())


@release.command()
def rollback(
    why: Why,
    adapter: Annotated[
        str, typer.Argument(help="Key of the adapter, or the beginning of it. Default: the one before.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Release an adapter again that was in use before, in one step and without training or evaluation.

    It stays in use until the reports, the recipe or the base model change and a new adapter beats it.
    """
    from ft_dagster.defs.releasing import roll_back

    _switch(roll_back, adapter, why, as_json)


@release.command()
def promote(
    adapter: Annotated[str, typer.Argument(help="Key of the adapter, or the beginning of it.")],
    why: Why,
    as_json: Json = False,
) -> None:
    """Release an adapter of the store, whatever the gate decided. The history keeps who did it, and why."""
    from ft_dagster.defs.releasing import promote as promote_adapter

    _switch(promote_adapter, adapter, why, as_json)


@release.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    adapter: Annotated[
        str, typer.Option(help="Key of an adapter, or the beginning of it. Default: the released one.")
    ] = "",
    gguf: Annotated[str, typer.Option(help=f"Also write a GGUF file of this type: {', '.join(GGUF_TYPES)}.")] = "",
    as_json: Json = False,
) -> None:
    """Write base and adapter as one model, for tools that cannot load adapters; with --gguf, for llama.cpp as well.

    A quantized base is merged in two ways, and the result that predicts held-out text better is kept.
    """
    console = Console(stderr=True)
    with errors_said(console):
        about = export_merged(load_settings(), adapter, folder, gguf, console)
    if as_json:
        print_json(about)


@release.command()
def push(
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; created if it does not exist.")],
    adapter: Annotated[
        str, typer.Option(help="Key of an adapter, or the beginning of it. Default: the released one.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it, show what would be uploaded.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Allow a public repository, and create a new one as public.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish an adapter on a hub, with a model card written from its manifest. Without --yes, only show the card.

    Read the card and `ft-dagster lineage show` first: an adapter may reveal what it was trained on.
    """
    console = Console(stderr=True)
    with errors_said(console):
        settings = load_settings()
        folder = adapter_folder(settings, adapter)
        manifest = read_manifest(folder)
        evaluation = open_store(settings).newest(EVALUATION, adapter=manifest.refit_of or manifest.key)
        card = model_card(manifest, evaluation.about if evaluation else None)
        address = None
        if yes:
            if settings.token is None:
                raise SettingsError("HUGGINGFACE_TOKEN is not set; put a token with write access into .env.")
            from huggingface_hub import HfApi

            address = publish(folder, manifest, card, repository, HfApi(token=settings.token), not public)
            console.print(f"Published: {address}", highlight=False, soft_wrap=True)
        else:
            names = [CARD, *published_files(manifest)]
            console.print(f"Would go to {repository}: {', '.join(names)}. Add --yes to upload.", highlight=False)
    if as_json:
        print_json({"adapter": manifest.key, "repository": repository, "commit": address, "card": card})
    elif not yes:
        typer.echo(card)


def _switch(
    how: "Callable[[DagsterInstance, Workspace, str, str], Mapping[str, Any]]", adapter: str, why: str, as_json: bool
) -> None:
    """Release an adapter in one of the two ways, and print which one is in use."""
    console = Console(stderr=True)
    with errors_said(console):
        from ft_dagster.defs.instance import open_instance
        from ft_dagster.defs.workspace import Workspace

        settings, workspace = load_settings(), Workspace()
        with open_instance(settings) as instance:
            entry = how(instance, workspace, adapter, why)
        console.print(f"In use now: {entry['adapter']}", highlight=False, soft_wrap=True)
        if "kept_as" in entry:
            console.print(
                f"The previous fine_tuned_model was moved to {entry['kept_as']}", highlight=False, soft_wrap=True
            )
        try:
            track(settings, workspace.store, workspace.releases)
        except TrackingError as error:  # the release does not depend on it
            console.print(str(error), highlight=False, soft_wrap=True, markup=False, style="yellow")
    if as_json:
        print_json(entry)


def _print_releases(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the history of releases as a table."""
    if not rows:
        console.print("Nothing was released yet.")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", "adapter", "since", "bits per byte", "decision"):
        table.add_column(column, overflow="fold")
    for row in rows:
        measured = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        by = f" by {row['by']}" if row["by"] else ""
        said = Text(f"{row['decision']}{by}: {row['reason']}")
        table.add_row("in use" if row["in_use"] else "", row["adapter"][:12], row["at"], measured, said)
    console.print(table, highlight=False)
