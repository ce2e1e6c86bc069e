"""What all commands share: the option --json, errors as one line, exit codes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from ft_dagster.base import BaseModelError
from ft_dagster.corpus.files import CorpusError
from ft_dagster.recipe import RecipeError
from ft_dagster.release.lineage import LineageError
from ft_dagster.release.released import ReleaseError
from ft_dagster.release.tracking import TrackingError
from ft_dagster.secrets import secrets_kept
from ft_dagster.settings import SettingsError
from ft_dagster.store import StoreError
from ft_dagster.training.manifest import AdapterError
from ft_dagster.training.number_format import UnknownRatesError

FAILED, SOMETHING_TO_DO, INTERRUPTED = 1, 2, 130
_BAD_INPUT = (
    CorpusError,
    RecipeError,
    BaseModelError,
    StoreError,
    SettingsError,
    AdapterError,
    ReleaseError,
    LineageError,
    TrackingError,
    UnknownRatesError,
    OSError,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]


@contextmanager
def errors_said(console: Console) -> Iterator[None]:
    """Errors that a user can mend become one line; an interruption its own exit code."""
    try:
        with secrets_kept():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from ft_dagster.defs.room import about_room

        room = about_room(str(error))
        if room is None and not isinstance(error, _BAD_INPUT):
            raise
        said = f"{type(error).__name__}: {error}" + (f"\n{room}" if room else "")
        console.print(said, highlight=False, soft_wrap=True, markup=False, style="red")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        console.print("Interrupted. What was finished is kept; training goes on from its last checkpoint.")
        raise typer.Exit(INTERRUPTED) from None


def print_json(content: object) -> None:
    """Plain data on standard output."""
    json.dump(content, sys.stdout, indent=1, ensure_ascii=False)
    typer.echo()
