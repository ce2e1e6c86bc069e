"""Compare the peak memory of real trainings on this machine with the estimate made before them.

    python benchmarks/memory.py [--reports FOLDER] [--output FILE]

Every row is one `python -m ft_dagster.training` on the same few blocks of text, and the peak is that of its process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import load_recipe, resolve_recipe
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned
from ft_dagster.runtime.machine import processor
from ft_dagster.store.local import Store
from ft_dagster.training.request import RESULT, TrainingRequest
from ft_dagster.training.sizing.estimate import memory_estimate

PROJECT = Path(__file__).parents[1]
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "as shipped": {},
    "gradient_checkpointing": {"training": {"gradient_checkpointing": True}},
    "rows_per_device: 1": {"training": {"rows_per_device": 1}},
    "rows_per_device: 4": {"training": {"rows_per_device": 4}},
    "rows_per_device: 4, gradient_checkpointing": {"training": {"rows_per_device": 4, "gradient_checkpointing": True}},
    "block_length: 1024": {"tokens": {"block_length": 1024}},
    "targets: [q_proj, v_proj]": {"lora": {"targets": ["q_proj", "v_proj"]}},
    "dtype: float32": {"base": {"dtype": "float32"}},
    "fused: false": {"training": {"fused": False}},
    "fused: false, gradient_checkpointing": {"training": {"fused": False, "gradient_checkpointing": True}},
    "fused: false, attention: eager": {"training": {"fused": False, "attention": "eager"}},
    "dropout: 0.05": {"lora": {"dropout": 0.05}},
    "quantization: nf4": {"base": {"quantization": "nf4"}},
    "quantization: nf4, gradient_checkpointing": {
        "base": {"quantization": "nf4"},
        "training": {"gradient_checkpointing": True},
    },
    "quantization: int8": {"base": {"quantization": "int8"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=PROJECT / "ft_dagster" / "examples")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "memory.md")
    options = parser.parse_args()
    shipped = load_recipe("smollm2-135m")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, parts) in enumerate(VARIANTS.items()):
            content = shipped.model_dump(mode="json")
            for part, fields in {**parts, "training": {"epochs": 0.2, **parts.get("training", {})}}.items():
                content[part] |= fields
            rows.append({"recipe": name, **measure(resolve_recipe(content), options.reports, Path(scratch), number)})
            print(json.dumps(rows[-1]), flush=True)
            options.output.write_text(as_table(rows))


def measure(recipe: Recipe, reports: Path, scratch: Path, number: int) -> dict[str, Any]:
    """Measure one training of a fifth of an epoch, in its own process."""
    base = prepare_base(recipe.base, Path(os.environ.get("FT_CACHE", "~/.cache/ft_dagster")).expanduser())
    sections = make_sections(take_snapshot(reports, scratch / "files.db", Store(scratch / "store")), recipe.corpus)
    split = choose_split(outline_sections(sections), recipe.tokens, Pinned())
    dataset = make_dataset(outline_sections(sections), Path(base.folder), base.tokenizer, recipe.tokens, split)
    attempt = scratch / f"attempt-{number}"
    request = TrainingRequest(
        key=f"{number}",
        base=base.to_json(),
        dataset=str(dataset.path),
        recipe=recipe.model_dump(mode="json"),
        attempt=str(attempt),
        logs=str(scratch / "logs"),
        locks=str(scratch / "locks"),
    )
    path = request.write(attempt / "request.json")
    command = [sys.executable, "-m", "ft_dagster.training", str(path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    result = json.loads((attempt / RESULT).read_bytes())
    config = json.loads((Path(base.folder) / "config.json").read_bytes())
    estimate = memory_estimate(config, recipe.computing_in(result["number_format"]), on_gpu=False)
    return {"measured": result["peak_memory_bytes"], "estimated": estimate.total, "parts": asdict(estimate)}


def as_table(rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [
        "# Memory of a training on a CPU",
        "",
        f"`python benchmarks/memory.py`, {datetime.now(UTC):%d %B %Y}, {processor()}, {versions}. SmolLM2-135M, the "
        "recipe `smollm2-135m` with the named change; each row is a training of a few optimizer steps in its own "
        "process. The measured memory is the peak resident memory of the process.",
        "",
        "| recipe | estimated GiB | measured GiB | estimate over measured |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        estimated, measured = row["estimated"] / 2**30, row["measured"] / 2**30
        lines.append(f"| {row['recipe']} | {estimated:.2f} | {measured:.2f} | {estimated / measured - 1:+.0%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
