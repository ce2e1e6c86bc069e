"""Make and measure adapters without Dagster: chapters -> dataset -> adapter -> bits per byte."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned
from ft_dagster.evaluation.request import RESULT as EVALUATION
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.request import RESULT, TrainingRequest, training_key

THREADS = os.cpu_count()


@dataclass(frozen=True)
class Made:
    """An adapter and the cost of making it."""

    folder: Path
    result: dict[str, Any]
    """The result of the training process."""
    seconds: float
    """Duration of the process, including start-up."""
    cpu_seconds: float


class Workbench:
    """A workspace with reports, from which adapters are made."""

    def __init__(self, chapters: Path, folder: Path, recipe: Recipe) -> None:
        """Copy the Markdown chapters of a folder into a new workspace, and prepare the base model."""
        self.folder = folder
        self.write(chapters)
        self.store = Store(folder / "store")
        self.pinned = Pinned()
        self.base: PreparedBase = prepare_base(recipe.base, Settings().cache)

    def write(self, chapters: Path) -> None:
        """Replace the chapters of the workspace with those of a folder."""
        shutil.rmtree(self.folder / "chapter_markdowns", ignore_errors=True)
        shutil.copytree(chapters, self.folder / "chapter_markdowns")

    def dataset(self, recipe: Recipe) -> Artifact:
        """Return the dataset of the current chapters. Held-out chapters stay held out."""
        snapshot = take_snapshot(self.folder, self.folder / "files.db", self.store)
        sections = make_sections(snapshot, recipe.corpus)
        tokens, objectives = recipe.tokens, recipe.objectives
        split = choose_split(outline_sections(sections), tokens, self.pinned, objectives)
        self.pinned = split.pinned
        return make_dataset(
            outline_sections(sections), Path(self.base.folder), self.base.tokenizer, tokens, split, objectives
        )

    def train(self, dataset: Artifact, recipe: Recipe, **more: Any) -> Made:
        """Make an adapter in a separate process, unless this folder already contains it."""
        key = training_key(dataset.about["version"], self.base.identity, recipe)
        attempt = self.folder / "attempts" / key[:16]
        request = TrainingRequest(
            key=key,
            base=self.base.to_json(),
            dataset=str(dataset.path),
            recipe=recipe.model_dump(mode="json"),
            attempt=str(attempt),
            logs=str(self.folder / "logs"),
            locks=str(self.folder / "locks"),
            threads=THREADS,
            **more,
        )
        seconds, cpu_seconds = _run("ft_dagster.training", request.write(attempt / "request.json"))
        return Made(attempt / "adapter", json.loads((attempt / RESULT).read_bytes()), seconds, cpu_seconds)

    def measure(self, dataset: Artifact, recipe: Recipe, adapters: dict[str, Path]) -> dict[str, Any]:
        """Return held-out measurements of the base and of adapters, by name, as the evaluation process reports them."""
        output = self.folder / "evaluation"
        request = EvaluationRequest(
            base=self.base.to_json(),
            dataset=str(dataset.path),
            recipe=recipe.model_dump(mode="json") | {"evaluation": {"prompts": [], "sample_tokens": 0}},
            adapters={name: str(path) for name, path in adapters.items()},
            known={},
            output=str(output),
            offload=str(self.folder / "offload"),
            locks=str(self.folder / "locks"),
            threads=THREADS,
        )
        _run("ft_dagster.evaluation", request.write(output / "request.json"))
        return json.loads((output / EVALUATION).read_bytes())


def _run(module: str, request: Path) -> tuple[float, float]:
    """Run a module as a child process, which must succeed, and return its wall and CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.run([sys.executable, "-m", module, str(request)], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{module} failed:\n{process.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
