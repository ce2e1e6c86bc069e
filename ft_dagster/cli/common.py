"""What all commands share: the option --json, errors as one line, exit codes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from ft_dagster.config.redaction import secrets_kept
from ft_dagster.errors import UserError

FAILED, SOMETHING_TO_DO, INTERRUPTED = 1, 2, 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]


@contextmanager
def errors_said(console: Console) -> Iterator[None]:
    """Errors that a person can fix become one line; an interruption gets an exit code of its own."""
    try:
        with secrets_kept():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from ft_dagster.defs.runs.disk import disk_advice

        room = disk_advice(str(error))
        if room is None and not isinstance(error, (UserError, OSError)):
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
