"""Tables for the terminal: the summary of a run (text, quality, adapter), the plan, and what could be removed."""

import os
import shlex
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.files import shown
from ft_dagster.dataset.packing import PADDED
from ft_dagster.defs.automation.cost import TrainingCost
from ft_dagster.defs.automation.plan import Plan
from ft_dagster.defs.clean import Removable
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    ARTIFACT,
    SECTIONS,
    TOKENIZED_DATASET,
    Stage,
    latest_materialization,
)
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.lineage import never_trained_on
from ft_dagster.release.released import Releases
from ft_dagster.store.local import Artifact, Store
from ft_dagster.store.shared import open_store


def summarize(instance: dg.DagsterInstance, settings: Settings) -> dict[str, Any]:
    """Return the state of the workspace as plain data."""
    store = open_store(settings)
    dataset = _latest(instance, store, TOKENIZED_DATASET)
    evaluation = _latest(instance, store, ADAPTER_EVALUATION).about
    sections = latest_materialization(instance, SECTIONS.key)
    ledger = dataset.about["ledger"]
    models = evaluation["models"]
    used = ledger["train"] + ledger["held_out"]
    folder = Releases(settings.fine_tuned_model, settings.state).current_folder()
    return {
        "chapters": sections.metadata["chapters"].value if sections else 0,
        "tokens": sum(side["tokens"] for side in dataset.about["splits"].values()),
        "usable_bytes": dataset.about["usable"],
        "used_bytes": used,
        "held_out": dataset.about["held_out"],
        "held_out_bytes": ledger["held_out"],
        "never_trained_on": never_trained_on(read_manifest(folder), dataset) if folder else None,
        "refits": load_recipe(settings.recipe, settings.workspace).release.refit,
        "bits_per_byte": {name: model["bits_per_byte"] for name, model in models.items()},
        "sample": {name: model["samples"][0] for name, model in models.items() if model["samples"]},
        "verdict": evaluation["verdict"],
        "adapter": str(settings.fine_tuned_model) if settings.fine_tuned_model.exists() else None,
        "workspace": str(settings.workspace),
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the summary as a short table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    share = summary["used_bytes"] / summary["usable_bytes"]
    table.add_row("chapters, tokens", f"{summary['chapters']}, {summary['tokens']:,}")
    table.add_row("usable text trained on or held out", f"{share:.1%}")
    held_out = summary["held_out_bytes"] / summary["used_bytes"]
    names = ", ".join(shown(name, _LONGEST_NAME) for name in summary["held_out"])
    table.add_row("held out", Text(f"{names} ({held_out:.1%} of the text)"))
    if summary["never_trained_on"] is not None:
        table.add_row("never trained on", Text(_never_trained_on(summary)))
    for name, value in summary["bits_per_byte"].items():
        table.add_row(f"bits per byte, {_LABELS[name]}", f"{value:.4f}")
    table.add_row("verdict", f"{summary['verdict']['decision']}: {summary['verdict']['reason']}")
    for name, reason in summary["verdict"].get("not_measured", {}).items():
        table.add_row(f"{name}, not measured", Text(reason))
    for name, sample in summary["sample"].items():
        table.add_row(f"{_LABELS[name]} writes", Text(sample["prompt"]).append(sample["text"], style="bold"))
    table.add_row("released adapter", Text(summary["adapter"] or "none yet"))
    table.add_row("see it", Text(_command_for_the_ui(summary["workspace"])))
    console.print()
    console.print(table, highlight=False)


def _never_trained_on(summary: dict[str, Any]) -> str:
    """Return what the released adapter has not learned, and how it would."""
    if not summary["never_trained_on"]:
        return "nothing: the released adapter was trained again on all text"
    names = ", ".join(shown(name, _LONGEST_NAME) for name in summary["never_trained_on"])
    if set(summary["never_trained_on"]) == set(summary["held_out"]):
        names = "the held-out text"
    how = "" if summary["refits"] else "; `release: {refit: true}` in the recipe trains on it, too, after the gate"
    return f"{names}{how}"


def _command_for_the_ui(workspace: str) -> str:
    """Return the command that starts the UI: `make dev` in a checkout, else Dagster's own, with the same history."""
    variables = f"FT_WORKSPACE={shlex.quote(os.path.relpath(workspace))}"
    checkout = Path(__file__).resolve().parents[2]
    if Path.cwd() == checkout and (checkout / "Makefile").is_file():
        return f"{variables} make dev"
    home = os.environ.get("DAGSTER_HOME") or f"{workspace}/.dagster"
    return f"{variables} DAGSTER_HOME={shlex.quote(home)} dagster dev --module-name ft_dagster.definitions"


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan."""
    for label, changes in (("added", plan.added), ("edited", plan.edited), ("removed", plan.removed)):
        if changes:
            console.print(f"[bold]{len(changes)} chapter(s) {label}[/]", highlight=False)
        for change in changes[:_MOST_CHAPTERS]:
            words = f"{change.words:,} words"
            if label == "edited":
                words += f" ({change.words - change.words_before:+,})"
            console.print(Text(f"  {shown(change.chapter, _LONGEST_NAME)}: {words}"))
        if len(changes) > _MOST_CHAPTERS:
            console.print(f"  and {len(changes) - _MOST_CHAPTERS} more", highlight=False)
    if plan.nothing_to_do:
        console.print(NOTHING_TO_DO)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "because", "outcome"):
        table.add_column(column, overflow="fold")
    for stage in plan.stages:
        table.add_row(stage.stage, f"{stage.reason} ({stage.kind})", _OUTCOMES[stage.outcome])
    console.print(table, highlight=False)
    console.print(_cost(plan), highlight=False, soft_wrap=True, markup=False)  # it names files and headings


def _cost(plan: Plan) -> str:
    if plan.refused:
        named = [f"  {shown(item.path, _LONGEST_NAME)}: {item.reason}" for item in plan.refused[:_MOST_CHAPTERS]]
        more = [f"  and {len(plan.refused) - len(named)} more"] if len(plan.refused) > len(named) else []
        return "\n".join(["The run stops before training because of", *named, *more])
    about = ("at most " if plan.at_most else "") + ("" if plan.exact else "about ")
    refit = [_refit(plan.refit)] if plan.refit else []
    if not plan.trains:
        return "\n".join(["No training.", *refit])
    chapters = f" of {plan.train_chapters:,} chapter(s)" if plan.train_chapters is not None else ""
    steps = f"Training: {about}{plan.train_tokens:,} tokens{chapters} an epoch, {about}{plan.steps:,} optimizer steps"
    advice = [plan.advice] if plan.advice else []
    if plan.held_out_share is not None:
        names = [shown(name, _LONGEST_NAME) for name in plan.held_out[:_MOST_CHAPTERS]]
        more = [f"and {len(plan.held_out) - len(names)} more"] if len(plan.held_out) > len(names) else []
        advice.insert(0, f"Held out: {', '.join([*names, *more])} ({plan.held_out_share:.1%} of the text).")
        advice[1:1] = refit or [_NEVER_LEARNED]
    if plan.training is None:
        return "\n".join([f"{steps}.", *advice])
    lines = [f"{steps}; {_time(plan, plan.training)}.", *advice, *_number_format(plan.training), _memory(plan.training)]
    lines += [_PADDED] if plan.training.layout == PADDED else []
    return "\n".join(lines)


def _refit(cost: TrainingCost) -> str:
    time = f", {_minutes(cost.seconds)}" if cost.seconds is not None else ""
    return f"If the gate releases it, it is trained again on all text, the held-out text included{time}."


def _time(plan: Plan, cost: TrainingCost) -> str:
    if plan.seconds is not None and cost.measured_on:
        return f"{_minutes(plan.seconds)}, at the speed last measured on {cost.measured_on}"
    if cost.measured_on and cost.seconds is not None:
        return f"{_minutes(cost.seconds)} and the evaluation, at the speed last measured on {cost.measured_on}"
    if cost.seconds is not None:
        return f"{_minutes(cost.seconds)} and the evaluation, by the model's operations and how fast this machine is"
    return "the time is unknown before the first training of this kind"


def _minutes(seconds: float) -> str:
    """Return a duration in words.

    >>> _minutes(20), _minutes(400), _minutes(20000)
    ('about 1 min', 'about 7 min', 'about 5.6 h')
    """
    return f"about {max(1, round(seconds / 60))} min" if seconds < 2 * 3600 else f"about {seconds / 3600:.1f} h"


def _number_format(cost: TrainingCost) -> list[str]:
    where = [cost.where] if cost.where else []
    said = [f"{cost.number_format} on this machine", *where] if cost.number_format else where
    return [*([f"Number format: {'; '.join(said)}."] if said else []), *([cost.slow] if cost.slow else [])]


def _memory(cost: TrainingCost) -> str:
    if cost.memory_bytes is None:
        return f"Memory: no estimate, {cost.problem}."
    measured = f"; {cost.measured_memory_bytes / 2**30:.1f} GiB the last time" if cost.measured_memory_bytes else ""
    problem = f" {cost.problem}" if cost.problem else ""
    return f"Memory: about {cost.memory_bytes / 2**30:.1f} GiB at the peak{measured}.{problem}"


def print_removable(removable: Removable, console: Console) -> None:
    """Print what could be removed."""
    if not removable:
        console.print("[green]Nothing to remove.[/]")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("what is not needed", "how many", "MB"):
        table.add_column(column, justify="left" if column.startswith("what") else "right")
    sizes = removable.sizes()
    for name, (count, size) in sizes.items():
        table.add_row(name, f"{count:,}", f"{size / 1e6:,.1f}")
    table.add_row("total", "", f"{sum(size for _, size in sizes.values()) / 1e6:,.1f}")
    console.print(table, highlight=False)
    console.print(
        f"{len(removable.kept_adapters)} adapter(s) kept, with everything they were made from.", highlight=False
    )


NOTHING_TO_DO = "[green]Nothing to do:[/] no report, recipe, base model or code changed since the last run."
_PADDED = "Rows: each piece of text gets a row of its own; packed pieces would see each other in this base model."
_NEVER_LEARNED = "It is never trained on; with `release: {refit: true}` it is, after an adapter has passed the gate."
_MOST_CHAPTERS = 10
_LONGEST_NAME = 255
"""Characters of a chapter's name that are printed; a file name cannot have more."""
_OUTCOMES = {
    "runs": "runs",
    "unchanged": "runs; its content will be the same",
    "reused": "made before, used again",
    "blocked": "stops here",
    "if needed": "runs if that changes",
}
_LABELS = {"base": "base", "released": "released before", "new": "adapter"}


def _latest(instance: dg.DagsterInstance, store: Store, stage: Stage) -> Artifact:
    found = latest_materialization(instance, stage.key)
    if found is None:
        raise dg.Failure(f"{stage.name} has not been materialized.")
    return store.get(stage.name, str(found.metadata[ARTIFACT].value))
