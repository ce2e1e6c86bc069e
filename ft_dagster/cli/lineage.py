"""`ft-dagster lineage`: what an adapter was made from, and which adapters were trained on a text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ft_dagster.cli.common import FAILED, Json, errors_said, print_json
from ft_dagster.config.settings import Settings, load_settings
from ft_dagster.model.manifest import Manifest, read_manifest
from ft_dagster.release import lineage as release_lineage
from ft_dagster.release.released import adapter_folder
from ft_dagster.store.shared import open_store

lineage = typer.Typer(
    help="Show what adapters were made from. Without a command: what the released adapter was made from."
)
_SHOWN = 12
"""Characters of a hash that are shown."""
Name = Annotated[str, typer.Argument(help="Key of an adapter, or the beginning of it. Default: the released one.")]
AnotherName = Annotated[
    str, typer.Argument(help="Key of the adapter to compare, or the beginning of it. Default: the released one.")
]


@lineage.callback(invoke_without_command=True)
def released(context: typer.Context, as_json: Json = False) -> None:
    """Show what the released adapter was made from, unless a command is given."""
    if context.invoked_subcommand is None:
        show(as_json=as_json)


@lineage.command()
def show(adapter: Name = "", as_json: Json = False) -> None:
    """Show the chapters of an adapter with the versions of their files, and its base, recipe and code."""
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        manifest = _manifest(settings, adapter)
        chapters = release_lineage.chapters_of(manifest)
    if as_json:
        print_json({"adapter": manifest.key, "chapters": [asdict(item) for item in chapters]} | _made(manifest))
        return
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {"adapter": manifest.key, **_made(manifest)}.items():
        facts.add_row(name, Text(str(value)))
    table = Table(box=None, pad_edge=False)
    for column in ("chapter", "texts trained on", "held out", "file", "SHA-256"):
        table.add_column(column, overflow="fold")
    for item in chapters:
        files = sorted(item.files.items()) or [("not in the reports any more", "")]
        for index, (file, sha256) in enumerate(files):
            first = (Text(item.chapter), str(item.trained_on), "held out" if item.held_out else "")
            table.add_row(*(first if index == 0 else ("", "", "")), Text(file), sha256[:_SHOWN])
    console.print(facts, table, sep="\n\n", highlight=False)


@lineage.command()
def diff(
    before: Annotated[str, typer.Argument(help="Key of an adapter, or the beginning of it.")],
    after: AnotherName = "",
    as_json: Json = False,
) -> None:
    """Show what changed from one adapter to another, and how that changed the score of each held-out chapter."""
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        store = open_store(settings)
        old, new = _manifest(settings, before), _manifest(settings, after)
        found = release_lineage.compare(old, new)
        measured = [release_lineage.measured(store, m.refit_of or m.key) or {} for m in (old, new)]
        scores = [one.get("chapters", {}) for one in measured]
    chapters = {
        name: [side[name]["bits_per_byte"] if name in side else None for side in scores]
        for name in sorted(scores[0].keys() | scores[1].keys())
    }
    if as_json:
        by_chapter = {name: {"before": values[0], "after": values[1]} for name, values in chapters.items()}
        print_json({"before": old.key, "after": new.key} | asdict(found) | {"bits_per_byte": by_chapter})
        return
    console = Console()
    if found.nothing:
        console.print("The two were made from the same chapters, recipe, base and code.")
    for label, names in (("added", found.added), ("edited", found.edited), ("removed", found.removed)):
        if names:
            console.print(Text(f"{label}: {', '.join(names)}"), soft_wrap=True)
    for label, changes in (("recipe", found.recipe), ("base", found.base), ("made by", found.made_by)):
        for change in changes:
            console.print(Text(f"{label}: {change.field} {change.before} -> {change.after}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("held-out chapter", "bits per byte before", "after", "change"):
        table.add_column(column, overflow="fold")
    for name, (first, second) in chapters.items():
        by = f"{second - first:+.4f}" if first is not None and second is not None else ""
        table.add_row(Text(name), *("" if x is None else f"{x:.4f}" for x in (first, second)), by)
    console.print(table, highlight=False)


@lineage.command()
def find(
    text: Annotated[str, typer.Argument(help="For example a sentence. Case and white space are ignored.")] = "",
    chapter: Annotated[str, typer.Option(help="The name of a chapter, instead of a text.")] = "",
    as_json: Json = False,
) -> None:
    """List the adapters that were trained on a text or a chapter. Exit codes: 0 some were, 1 none was."""
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        store = open_store(settings)
        if bool(text) == bool(chapter):
            raise release_lineage.LineageError("Name a text, or a chapter with --chapter.")
        if chapter:
            places = {key: [(chapter, "")] for key in release_lineage.trained_on_chapter(store, chapter)}
        else:
            places = release_lineage.trained_on_text(store, text)
    if as_json:
        print_json([{"adapter": key, "places": [list(place) for place in found]} for key, found in places.items()])
    else:
        console = Console()
        for key, found in places.items():
            where = "; ".join(f"{name}: {title}" if title else name for name, title in found)
            console.print(Text(f"{key[:_SHOWN]}  {where}"), soft_wrap=True)
        if not places:
            console.print("No adapter in the store was trained on it.")
    if not places:
        raise typer.Exit(FAILED)


@lineage.command()
def restore(
    adapter: Annotated[str, typer.Argument(help="Key of the adapter, or the beginning of it.")],
    folder: Annotated[Path, typer.Argument(help="A new folder; it becomes a workspace.")],
    as_json: Json = False,
) -> None:
    """Write the reports that an adapter was made from, byte for byte, with its recipe and what was held out.

    `FT_WORKSPACE=FOLDER FT_RECIPE=recipe.yaml ft-dagster run` then makes the adapter again. On a CPU, with the same
    versions of code and libraries, it has the same bytes.
    """
    console = Console(stderr=True)
    with errors_said(console):
        settings = load_settings()
        manifest = _manifest(settings, adapter)
        files = release_lineage.restore(open_store(settings), manifest, folder)
        console.print(
            f"{len(files)} files of {manifest.key[:_SHOWN]} are in {folder}.", highlight=False, soft_wrap=True
        )
    if as_json:
        print_json({"adapter": manifest.key, "folder": str(folder), "files": files})


def _manifest(settings: Settings, beginning: str) -> Manifest:
    return read_manifest(adapter_folder(settings, beginning))


def _made(manifest: Manifest) -> dict[str, Any]:
    return {
        "base": f"{manifest.base['name']}, revision {manifest.revision[:_SHOWN]}",
        "recipe": manifest.recipe["name"],
        "dataset": manifest.dataset,
        "code": f"{manifest.code} (ft_dagster {manifest.package})",
        "step": manifest.step,
        "started from": manifest.started_from or "the base",
        "libraries": ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
    }
