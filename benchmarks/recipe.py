"""Find the recipe that learns most, by held-out bits per byte on real reports, with one field changed at a time.

    python benchmarks/recipe.py FOLDER [FOLDER ...]

Each FOLDER contains the Markdown chapters of a report. Starting from the shipped recipe, learning rate, epochs, rank,
rows per step, block length and dropout are changed one after the other. The best value of each is kept before the next
field is tried: the one with the largest gain over the base in bits per byte, averaged over the reports. The same
chapters are held out each time, and measured in blocks of the shipped recipe's length, because text is harder to
predict with less text before it.
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

PROJECT = Path(__file__).parents[1]
STEPS: list[tuple[str, list[Any]]] = [
    ("training.learning_rate", [5e-4, 1e-3, 2e-3, 4e-3]),
    ("training.epochs", [1, 2, 3]),
    ("lora.rank", [8, 16, 32]),
    ("training.rows_per_step", [1, 2, 4]),
    ("tokens.block_length", [256, 512, 1024]),
    ("lora.dropout", [0.0, 0.05]),
]
"""The fields in the order in which they are tried, with their values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "recipe.md")
    options = parser.parse_args()
    recipe = shipped = load_recipe(options.recipe)
    lines = [
        "# Recipes for SmolLM2-135M-Instruct, measured",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {version('torch')}, peft {version('peft')}: "
        f"`python benchmarks/recipe.py {' '.join(path.parent.name for path in options.reports)}`.",
        "Held-out bits per byte: base -> adapter. One field changed at a time; the best value is kept for the next.",
        "",
        f"| | {' | '.join(path.parent.name for path in options.reports)} | mean gain | CPU-seconds of training |",
        "|---|" + "---|" * (len(options.reports) + 2),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        benches = {p: Workbench(p, Path(scratch) / p.parent.name, recipe) for p in options.reports}
        seen: dict[str, float] = {}
        for field, values in STEPS:
            gains = {}
            for value in values:
                candidate = _with(recipe, field, value)
                key = candidate.model_dump_json()
                if key not in seen:
                    cells, gain, cost = _try(list(benches.values()), candidate, shipped)
                    seen[key] = gain
                    lines.append(f"| {_label(candidate)} | {' | '.join(cells)} | {gain:.4f} | {cost:.0f} |")
                    print(lines[-1], flush=True)
                    options.output.write_text("\n".join(lines) + "\n", "utf-8")
                gains[value] = seen[key]
            best = max(gains, key=lambda value: gains[value])
            print(f"{field}: {best}", flush=True)
            recipe = _with(recipe, field, best)
        lines += ["", f"Best: {_label(recipe)}."]
    options.output.write_text("\n".join(lines) + "\n", "utf-8")


def _try(benches: list[Workbench], recipe: Recipe, shipped: Recipe) -> tuple[list[str], float, float]:
    """Train and measure a recipe on all reports. Return a cell for each, the mean gain, and CPU-seconds of training."""
    cells, gains, cost = [], [], 0.0
    for bench in benches:
        made = bench.train(bench.dataset(recipe), recipe)
        models = bench.measure(bench.dataset(shipped), shipped, {"new": made.folder})["models"]
        before, after = models["base"]["bits_per_byte"], models["new"]["bits_per_byte"]
        cells.append(f"{before:.4f} -> {after:.4f}")
        gains.append(before - after)
        cost += made.cpu_seconds
    return cells, sum(gains) / len(gains), cost


def _with(recipe: Recipe, field: str, value: Any) -> Recipe:
    part, name = field.split(".")
    content = recipe.model_dump(mode="json")
    content[part][name] = value
    if name == "rank":
        content["lora"]["alpha"] = 2 * value  # keeps the scale of the update
    if name == "rows_per_step":
        content["training"]["rows_per_device"] = min(value, recipe.training.rows_per_device)
    return resolve_recipe(content)


def _label(recipe: Recipe) -> str:
    options = recipe.training
    return (
        f"lr {options.learning_rate:g}, {options.epochs:g} epochs, r {recipe.lora.rank}, "
        f"dropout {recipe.lora.dropout:g}, {options.rows_per_step} x {recipe.tokens.block_length}"
    )


if __name__ == "__main__":
    main()
