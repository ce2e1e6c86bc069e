"""A workspace that `dagster dev` watches and that a test may change."""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from dagster_dev import WRITING, DagsterDev, Made
from dagster_ui import Run, Tick
from lineage import sections

from ft_dagster.store.local import write_atomically


@dataclass
class Watched:
    """A workspace that `dagster dev` watches, and what it found there when it was started."""

    dev: DagsterDev
    folder: Path
    found: Made

    def chapter(self, name: str) -> Path:
        return self.folder / "chapter_markdowns" / f"{name}.md"

    def append(self, name: str, sentence: str) -> None:
        with self.chapter(name).open("a", encoding="utf-8") as file:
            file.write(f"\n{sentence}\n")

    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "recipe.yaml").read_text())

    def save_recipe(self, recipe: dict[str, Any]) -> None:
        write_atomically(self.folder / "recipe.yaml", yaml.safe_dump(recipe))

    @property
    def released(self) -> str:
        """The key of the released adapter."""
        return (self.folder / "fine_tuned_model").resolve().name

    def adapter(self, key: str) -> Path:
        return self.folder / ".ft" / "store" / "lora_adapter" / key

    def current_text(self) -> str:
        """The current text of all sections."""
        key = self.dev.asset("sections").metadata["artifact"]
        return "\n".join(section.text for section in sections(self.folder, key))


def statuses(runs: list[Run]) -> list[str]:
    return [run.status for run in runs]


def asked_at_once(ticks: list[Tick]) -> bool:
    """Return whether the first tick after the reports had settled requested a run, and no later tick did."""
    waited = list(takewhile(lambda tick: not tick.runs, ticks))
    return all(WRITING in tick.skipped for tick in waited) and sum(bool(tick.runs) for tick in ticks) == 1
