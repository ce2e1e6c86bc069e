"""`ft-dagster release`: what is in use, what was, and who decided it."""

from typing import Annotated

import typer
from rich.console import Console

from ft_dagster.cli.common import Json, errors_said, print_json
from ft_dagster.settings import load_settings

release = typer.Typer(help="The released adapter: its history, and switching it by hand.", no_args_is_help=True)
Why = Annotated[str, typer.Option("--why", help="The reason, for the history.")]


@release.command("list")
def list_releases(as_json: Json = False) -> None:
    """Every release, oldest first, and which adapter is in use."""
    console = Console(stderr=True)
    with errors_said(console):
        from ft_dagster.defs.releasing import list_history
        from ft_dagster.defs.summary import print_releases
        from ft_dagster.defs.workspace import Workspace

        rows = list_history(Workspace())
    if as_json:
        print_json(rows)
    else:
        print_releases(rows, Console())


@release.command()
def rollback(
    why: Why,
    adapter: Annotated[str, typer.Argument(help="Its key, or the beginning of it. Default: the one before.")] = "",
    as_json: Json = False,
) -> None:
    """Put an adapter that was in use before back in use, in one step and without training or measuring.

    It stays in use until the reports, the recipe or the base change and a new adapter beats it.
    """
    console = Console(stderr=True)
    with errors_said(console):
        from ft_dagster.defs.instance import open_instance
        from ft_dagster.defs.releasing import roll_back
        from ft_dagster.defs.workspace import Workspace

        with open_instance(load_settings()) as instance:
            entry = roll_back(instance, Workspace(), adapter, why)
        console.print(f"In use now: {entry['adapter']}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(entry)


@release.command()
def promote(
    adapter: Annotated[str, typer.Argument(help="Its key, or the beginning of it.")],
    why: Why,
    as_json: Json = False,
) -> None:
    """Put an adapter of the store in use whatever the gate said. The history keeps who did it, and why."""
    console = Console(stderr=True)
    with errors_said(console):
        from ft_dagster.defs.instance import open_instance
        from ft_dagster.defs.releasing import promote as promote_adapter
        from ft_dagster.defs.workspace import Workspace

        with open_instance(load_settings()) as instance:
            entry = promote_adapter(instance, Workspace(), adapter, why)
        console.print(f"In use now: {entry['adapter']}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(entry)
