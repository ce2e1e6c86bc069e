"""`ft-dagster doctor`: what this machine can run."""

from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ft_dagster.cli.common import FAILED, Json, errors_said, print_json
from ft_dagster.config.settings import load_settings

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "bold red")}


def doctor(as_json: Json = False) -> None:
    """Show this machine's devices, memory and number formats, and what the recipe in use needs, changing nothing.

    Exit codes: 0 the recipe can be trained here; 1 something prevents it.
    """
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        from ft_dagster.cli.examination import examine

        found = list(examine(settings))
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in found:
            mark, style = _MARKS[finding.status]
            table.add_row(Text(mark, style=style), Text(finding.subject, style="bold"), Text(finding.text))
        Console().print(table)
    if any(finding.status == "problem" for finding in found):
        raise typer.Exit(FAILED)
