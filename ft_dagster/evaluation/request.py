"""What an evaluation process is asked to measure, as one JSON file, and what it measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_dagster.base import PreparedBase
from ft_dagster.recipe import Recipe, resolve_recipe
from ft_dagster.store import digest, write_atomically

CODE_VERSION = "3"
"""Raised by hand when the same request would give other numbers."""
RESULT = "evaluation.json"


def evaluation_key(
    adapter: str, dataset_version: str, in_use: str | None, recipe: Recipe, released_before: bool = False
) -> str:
    """The key of an evaluation: what was compared, on what, how."""
    return digest(
        {
            "adapter": adapter,
            "dataset": dataset_version,
            "in_use": in_use,
            "released_before": released_before,
            "recipe": recipe.part("evaluation", "release"),
            "code": CODE_VERSION,
        }
    )


def measured_by(held_out_version: str, base: Mapping[str, str], recipe: Recipe) -> str:
    """What decides the measurements of a model: two evaluations that agree in this need not measure it twice."""
    part = recipe.base.model_dump(mode="json", include={"quantization", "dtype"})
    options = recipe.training.model_dump(mode="json", include={"attention", "fused"})
    return digest([held_out_version, dict(base), part, options, recipe.part("evaluation"), CODE_VERSION])


@dataclass(frozen=True)
class EvaluationRequest:
    """Models to compare: the base, and adapters on it."""

    base: dict[str, str]
    """A PreparedBase."""
    dataset: str
    """Folder of the dataset's artifact."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    adapters: dict[str, str]
    """Name -> folder of those to measure; `new`, and `released` where there is one on the same base."""
    known: dict[str, Any]
    """Name -> measurements of models that were measured before in the same way; the base is measured if not here."""
    output: str
    """Folder for evaluation.json."""
    offload: str
    locks: str
    """Folder for the lock that keeps one process a device."""
    threads: int | None = None

    def prepared_base(self) -> PreparedBase:
        return PreparedBase(**self.base)

    def resolved_recipe(self) -> Recipe:
        return resolve_recipe(self.recipe)

    def write(self, path: Path) -> Path:
        """Write the request where the evaluation process will read it."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))
        return path

    @classmethod
    def read(cls, path: Path) -> "EvaluationRequest":
        return cls(**json.loads(path.read_bytes()))
