"""A report, and the contenders that train on it and are measured on its held-out chapters."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.adapters import Workbench
from benchmarks.contenders import OURS, Contender
from benchmarks.peers.contender import RESULT, Request
from benchmarks.processes import Cost, child_environment, run
from ft_dagster.config.recipe import Recipe
from ft_dagster.dataset.dataset import all_documents, load_rows
from ft_dagster.evaluation.request import EvaluationRequest
from ft_dagster.store.local import Artifact
from ft_dagster.training.request import RESULT as TRAINED
from ft_dagster.training.request import TrainingRequest, training_key

PROJECT = Path(__file__).parents[1]
PEERS = PROJECT / "benchmarks" / "peers"


@dataclass(frozen=True)
class Run:
    """The result of one contender in one round."""

    cost: Cost
    result: dict[str, Any]
    adapter: Path


class Match:
    """Runs all contenders on one report."""

    def __init__(self, chapters: Path, scratch: Path, recipe: Recipe, threads: int, patience_seconds: float) -> None:
        """Make the dataset, and find out which files are held out.

        Args:
            chapters: folder with the Markdown files.
            scratch: folder for everything that is made.
            recipe: the recipe of ft_dagster, whose number of epochs, an integer, applies to all contenders.
            threads: the number of threads of each contender.
            patience_seconds: if training would take longer than this, only the contender's rate is measured.
        """
        self.scratch, self.recipe, self.threads = scratch, recipe, threads
        self.patience_seconds = patience_seconds
        self.bench = Workbench(chapters, scratch / "workspace", recipe)
        self.dataset: Artifact = self.bench.dataset(recipe)
        self.base = Path(self.bench.base.folder)
        documents = list(all_documents(self.dataset))
        held_out = {self.bench.folder / d.source for d in documents if d.split == "held_out"}
        if held_out & {self.bench.folder / d.source for d in documents if d.split == "train"}:
            sys.exit(f"{chapters} is a single chapter: whole chapters must be held out. Name a folder with several.")
        files = sorted((self.bench.folder / "chapter_markdowns").rglob("*.md"))
        self.files = [file for file in files if file not in held_out]
        self.held_out = sorted(file.name for file in held_out)
        tokenizer = Tokenizer.from_file(str(self.base / "tokenizer.json"))
        texts = [file.read_text("utf-8-sig", errors="replace") for file in self.files]
        self.tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        """The number of tokens in the Markdown of the training chapters, by the base's tokenizer."""
        self.end_id = tokenizer.token_to_id(json.loads((self.base / "tokenizer_config.json").read_bytes())["eos_token"])

    def train(self, contender: Contender, python: Path, number: int) -> Run:
        """Run a contender. Raise ProcessError if it fails."""
        output = self.scratch / f"{contender.name}-{number}"
        output.mkdir()
        recipe = self.recipe
        numbers = recipe.lora.model_dump() | recipe.training.model_dump() | recipe.tokens.model_dump()
        options = contender.options
        adapter = output
        if contender.name == OURS:
            training = self._training_request(output / "attempt")
            options = {"training": str(training.write(output / "training.json"))}
            adapter = output / "attempt" / "adapter"
        request = Request(
            base=str(self.base),
            chapters=[str(file) for file in self.files],
            output=str(output),
            epochs=int(recipe.training.epochs),
            threads=self.threads,
            recipe=numbers,
            number_format=recipe.base.dtype,
            patience_seconds=self.patience_seconds,
            options=options,
        )
        path = request.write(output / "request.json")
        home = child_environment(output / "cache", self.threads, PROJECT if contender.name == OURS else None)
        cost = run([str(python), str(PEERS / contender.script), str(path)], output / "log.txt", home)
        result = json.loads((output / RESULT).read_bytes())
        if contender.name == OURS:
            result |= self._counted(json.loads((output / "attempt" / TRAINED).read_bytes())["supervised_tokens"])
        shutil.rmtree(output / "trainer", ignore_errors=True)
        return Run(cost, result, adapter)

    def _training_request(self, attempt: Path) -> TrainingRequest:
        base = self.bench.base
        return TrainingRequest(
            key=training_key(self.dataset.about["version"], base.identity, self.recipe),
            base=base.to_json(),
            dataset=str(self.dataset.path),
            recipe=self.recipe.model_dump(mode="json"),
            attempt=str(attempt),
            logs=str(self.scratch / "logs"),
            locks=str(self.scratch / "locks"),
            threads=self.threads,
        )

    def _counted(self, supervised: int) -> dict[str, Any]:
        """Count tokens and pieces in the rows of ft_dagster, over all epochs. Prompts of pieces are not supervised.

        Args:
            supervised: the number of tokens that reached the loss, by the count of the training process, which must be
                the same.
        """
        pieces: Counter[int] = Counter()
        text = ends = 0
        for row in load_rows(self.dataset, "train"):
            start = 0
            for length, shown in zip(row["lengths"], row["prompts"], strict=True):
                targets = row["input_ids"][start + shown : start + length]
                found = targets.count(self.end_id)
                ends += found
                text += len(targets) - found
                pieces[length] += 1
                start += length
        epochs = int(self.recipe.training.epochs)
        assert (text + ends) * epochs == supervised, f"{(text + ends) * epochs} tokens in rows, {supervised} in losses"
        counts = {length: count * epochs for length, count in pieces.items()}
        return {"text_tokens": text * epochs, "end_tokens": ends * epochs, "pieces": counts}

    def measure(self, adapters: dict[str, Path]) -> dict[str, float]:
        """Return held-out bits per byte of the base and of adapters, by name."""
        request = EvaluationRequest(
            base=self.bench.base.to_json(),
            dataset=str(self.dataset.path),
            recipe=self.recipe.model_dump(mode="json"),
            adapters={name: str(folder) for name, folder in adapters.items()},
            known={},
            output=str(self.scratch),
            offload=str(self.scratch / "offload"),
            locks=str(self.scratch / "locks"),
            threads=self.threads,
        )
        path = request.write(self.scratch / "measure.json")
        script = str(PROJECT / "benchmarks" / "held_out.py")
        environment = child_environment(self.scratch / "cache", self.threads, PROJECT)
        log = self.scratch / "measure.txt"
        run([sys.executable, script, str(path)], log, environment)
        return json.loads(log.read_text("utf-8").strip().splitlines()[-1])
