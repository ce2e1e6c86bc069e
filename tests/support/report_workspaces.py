"""Reports that change, with a store for what is made of them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_dagster.config.recipe import Corpus, Objectives, Tokens
from ft_dagster.corpus.sections import (
    make_sections,
)
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import TEXT
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.store.local import Artifact, Store

LIMIT = 3
OPTIONS = Tokens(block_length=16, held_out=0.3)
NAMES = [f"c{number}" for number in range(1, 13)]
HELD_OUT = Split(frozenset({"c2", "c7"}), Pinned())


class Reports:
    """Report files of a workspace, and a store that is kept between changes."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.workspace = folder
        self.store = Store(folder / "store")
        self.base = base

    def put(self, files: Mapping[str, str]) -> None:
        """Make these the only report files, given as {path: text}."""
        for folder in ("chapter_markdowns", "outputs"):
            shutil.rmtree(self.workspace / folder, ignore_errors=True)
        for path, text in files.items():
            (self.workspace / path).parent.mkdir(parents=True, exist_ok=True)
            (self.workspace / path).write_text(text, "utf-8")

    def write(self, name: str, text: str) -> None:
        path = self.workspace / "chapter_markdowns" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def sections(self) -> Artifact:
        return make_sections(take_snapshot(self.workspace, self.workspace / "files.db", self.store), Corpus())

    def dataset(self, split: Split = HELD_OUT, options: Tokens = OPTIONS, objectives: Objectives = TEXT) -> Artifact:
        return make_dataset(outline_sections(self.sections()), self.base, "the tiny base's", options, split, objectives)


def path_of(name: str) -> str:
    return f"chapter_markdowns/{name}.md"


def rewritten(name: str, pairs: Sequence[tuple[str, Any]]) -> tuple[str, str]:
    """Return the path and text of a report of (improved, original)."""
    sections = {
        f"S{number}": {
            "improved": f"{text}, {name} {number}\n\n## Sub {number}\n\nsub {name} {number}",
            "original": original,
        }
        for number, (text, original) in enumerate(pairs)
    }
    return f"outputs/consolidated/{name}.json", json.dumps({"sections": sections})
