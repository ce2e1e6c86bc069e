"""Measure cost and quality of retraining after a revision: from the base on all text, or continued on new text.

    python benchmarks/retraining.py FOLDER

FOLDER is a report with `revisions/`, which contains a folder for each dated revision, and `chapters/`, the last
revision. After each revision an adapter is made in four ways, and measured on that revision's held-out chapters:

- from the base, on all text (`training.start: base`);
- from the previous adapter made in the same way, on the rows with new text and 5 % of the others (`start: last`);
- the same with half the learning rate;
- not at all: the first adapter is kept.
"""

import argparse
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.adapters import Workbench
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import load_recipe, resolve_recipe
from ft_dagster.dataset.dataset import all_documents
from ft_dagster.store.local import Artifact

PROJECT = Path(__file__).parents[1]
WAYS = ("from the base", "from the one before", "from the one before, half the rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of chapters; a report has few")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "retraining.md")
    options = parser.parse_args()
    recipe = _with(load_recipe(options.recipe), "tokens", held_out=options.held_out)
    revisions = [*sorted((options.report / "revisions").iterdir()), options.report / "chapters"]
    lines = [
        "# Retraining: from the base on all of the text, or from the last adapter on what is new",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {version('torch')}, peft {version('peft')}, recipe "
        f"{recipe.name}: `python benchmarks/retraining.py {options.report.name}`.",
        "Held-out bits per byte, and in brackets CPU-seconds of the training process and tokens trained on.",
        "",
        f"| revision | new sections | base | first adapter | {' | '.join(WAYS)} |",
        "|---|---|---|---|" + "---|" * len(WAYS),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Workbench(revisions[0], Path(scratch) / "report", recipe)
        last: dict[str, Path] = {}
        known: set[str] = set()
        first: Path | None = None
        total = dict.fromkeys(WAYS, 0.0)
        for revision in revisions:
            bench.write(revision)
            dataset = bench.dataset(recipe)
            sections = {d.section for d in all_documents(dataset) if d.split == "train"}
            if not sections - known:
                lines.append(f"| {revision.name} | 0 of {len(sections)} | | | {'| ' * len(WAYS)}|")
                continue
            costs = {}
            for way in WAYS:
                made = bench.train(dataset, _recipe(recipe, way), lineage=_lineage(dataset), start=_start(last, way))
                last[way] = made.folder
                costs[way] = f"({made.cpu_seconds:.0f} s, {made.result['tokens_since_resume']})"
                total[way] += made.cpu_seconds if first else 0.0
            first = first or last[WAYS[0]]
            adapters = {"first": first} | {f"way-{index}": last[way] for index, way in enumerate(WAYS)}
            scores = {k: m["bits_per_byte"] for k, m in bench.measure(dataset, recipe, adapters)["models"].items()}
            cells = [f"{scores[f'way-{index}']:.4f} {costs[way]}" for index, way in enumerate(WAYS)]
            lines.append(
                f"| {revision.name} | {len(sections - known)} of {len(sections)} | {scores['base']:.4f} | "
                f"{scores['first']:.4f} | {' | '.join(cells)} |"
            )
            known |= sections
            print(lines[-1], flush=True)
        lines.append(f"| after the first, CPU-seconds | | | | {' | '.join(f'{total[way]:.0f}' for way in WAYS)} |")
    print(lines[-1])
    options.output.write_text("\n".join(lines) + "\n", "utf-8")


def _start(last: dict[str, Path], way: str) -> str | None:
    return str(last[way]) if way in last and way != WAYS[0] else None


def _recipe(recipe: Recipe, way: str) -> Recipe:
    rate = recipe.training.learning_rate / (2 if way == WAYS[2] else 1)
    return _with(recipe, "training", start="base" if way == WAYS[0] else "last", learning_rate=rate)


def _with(recipe: Recipe, part: str, **fields: Any) -> Recipe:
    content = recipe.model_dump(mode="json")
    return resolve_recipe(content | {part: content[part] | fields})


def _lineage(dataset: Artifact) -> dict[str, Any]:
    return {"trained_on": [{"section": d.section} for d in all_documents(dataset) if d.split == "train"]}


if __name__ == "__main__":
    main()
