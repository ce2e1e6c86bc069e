"""What an evaluation process is asked to measure, as one JSON file, and what it measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.evaluation.eval_sets import EvalSet
from ft_dagster.store.hashing import digest
from ft_dagster.training.request import ModelRequest

KIND = "adapter_evaluation"
"""What the store calls an evaluation."""
CODE_VERSION = "4"
"""Raised by hand when the same request would give other numbers."""
RESULT = "evaluation.json"
BASE, NEW, RELEASED = "base", "new", "released"
"""Names of models in an evaluation."""


def evaluation_key(
    adapter: str,
    dataset_version: str,
    in_use: str | None,
    recipe: Recipe,
    number_format: str,
    eval_sets: Mapping[str, EvalSet],
    released_before: bool = False,
    withdrawn: bool = False,
) -> str:
    """The key of an evaluation: what was compared, on what, how.

    Numbers that were computed in different formats are never taken for each other. A recipe that names its format has
    it in the adapter's key; where that is left to the machine, bfloat16 counts as it did before.
    """
    computed_in = {} if recipe.base.dtype != AUTO or number_format == "bfloat16" else {"computed_in": number_format}
    return digest(
        {
            **computed_in,
            "adapter": adapter,
            "dataset": dataset_version,
            "in_use": in_use,
            "released_before": released_before,
            "withdrawn": withdrawn,
            "recipe": [_options(recipe, eval_sets), recipe.part("release")],
            "code": CODE_VERSION,
        }
    )


def _options(recipe: Recipe, eval_sets: Mapping[str, EvalSet]) -> list[Any]:
    """How is measured; of texts beside the reports what they say, not where they are."""
    options = recipe.evaluation.for_keys(exclude=("general", "chat"))
    return [options, {kind: found.version for kind, found in eval_sets.items()}]


def measured_by(
    held_out_version: str, base: Mapping[str, str], recipe: Recipe, eval_sets: Mapping[str, EvalSet]
) -> str:
    """What decides the measurements of a model: two evaluations that agree in this need not measure it twice.

    Args:
        held_out_version: of the dataset.
        base: its identity.
        recipe: with its number format decided.
        eval_sets: texts beside the reports.
    """
    part = recipe.base.for_keys(include=("quantization", "dtype"))
    options = recipe.training.for_keys(include=("attention", "fused", "mixed_precision"))
    length = recipe.tokens.block_length  # texts beside the reports are cut to it, too
    return digest([held_out_version, dict(base), part, options, length, _options(recipe, eval_sets), CODE_VERSION])


@dataclass(frozen=True)
class EvaluationRequest(ModelRequest):
    """Models to compare: the base, and adapters on it. The recipe's number format is decided."""

    dataset: str
    """Folder of the dataset's artifact."""
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
    texts: dict[str, Any] = field(default_factory=dict)
    """Kind -> `files` and `folder` of a EvalSet: texts beside the reports."""

    def eval_sets(self) -> dict[str, EvalSet]:
        return {kind: EvalSet(kind, found["files"], Path(found["folder"])) for kind, found in self.texts.items()}


@dataclass(frozen=True)
class TalkRequest(ModelRequest):
    """An adapter to talk to, and how. The recipe is the adapter's."""

    adapter: str
    """Its folder."""
    offload: str
    prompt: str | None
    """What base and adapter go on with, or answer; None to hold a conversation."""
    as_chat: bool = False
    """Whether the prompt is a user's message rather than the beginning of a text."""
    as_json: bool = False
    new_tokens: int = 256
    temperature: float = 0.0
    """0: the most probable token, every time."""
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    seed: int | None = None


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """An adapter to be merged into its base. The recipe is the adapter's, its number format decided."""

    adapter: str
    """Its folder."""
    dataset: str | None
    """Folder of the dataset whose held-out side measures what the merge does; None where it is not there any more."""
    output: str
    """Folder of the merged model; made here."""
    offload: str
    threads: int | None = None
