"""What all commands share: the option --json, one-line errors, and exit codes."""

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
    """Print errors that the user can fix as one line, and exit with the code of a failure or an interruption."""
    try:
        with secrets_kept():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from ft_dagster.defs.runs.disk import disk_advice

        advice = disk_advice(str(error))
        if advice is None and not isinstance(error, (UserError, OSError)):
            raise
        said = f"{type(error).__name__}: {error}" + (f"\n{advice}" if advice else "")
        console.print(said, highlight=False, soft_wrap=True, markup=False, style="red")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        console.print("Interrupted. Finished stages are kept; training continues from its last checkpoint.")
        raise typer.Exit(INTERRUPTED) from None


def print_json(content: object) -> None:
    """Print plain data as JSON on standard output."""
    json.dump(content, sys.stdout, indent=1, ensure_ascii=False)
    typer.echo()
