"""Plots and tables for the metadata that the UI shows."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import dagster as dg

_MOST = 100
"""The most rows of a table that are shown."""


def loss_curve(history: Sequence[Mapping[str, float]]) -> dg.MarkdownMetadataValue:
    """Plot loss and learning rate over the steps, as a Markdown image. It is below 100 kB, so that the UI shows it."""
    from matplotlib.figure import Figure  # pyplot is slow to import and keeps its figures

    steps = [row["step"] for row in history]
    figure = Figure(figsize=(6, 3), dpi=90, layout="tight")
    loss_axis = figure.subplots()
    loss_axis.plot(steps, [row["loss"] for row in history], color="#2b6cb0")
    loss_axis.set_xlabel("optimizer step")
    loss_axis.set_ylabel("loss (nats per token)", color="#2b6cb0")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [row["learning_rate"] for row in history], color="#a0aec0", linewidth=1)
    rate_axis.set_ylabel("learning rate", color="#718096")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    return dg.MetadataValue.md(f"![loss by step](data:image/png;base64,{encoded})")


def table(rows: Iterable[Mapping[str, Any]], total: int | None = None) -> dg.MarkdownMetadataValue:
    """Return rows as a Markdown table, at most the first hundred.

    A line below it says how many more of `total` there are; the default is the number of rows.
    """
    remaining = iter(rows)
    shown = list(islice(remaining, _MOST))
    if not shown:
        return dg.MetadataValue.md("none")
    columns = list(shown[0])
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([_cell(row[column]) for column in columns]) for row in shown]
    total = len(shown) + sum(1 for _ in remaining) if total is None else total
    if total > len(shown):
        lines.append(f"\n{total - len(shown)} more of {total}")
    return dg.MetadataValue.md("\n".join(lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
