"""Requests to evaluation processes, each a JSON file, and the keys of their results."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_dagster.config.recipe import AUTO, Recipe
from ft_dagster.evaluation.eval_sets import EvalSet
from ft_dagster.store.hashing import digest
from ft_dagster.training.request import ModelRequest

KIND = "adapter_evaluation"
"""Kind of evaluations in the store."""
CODE_VERSION = "4"
"""Increased by hand when the same request would give other numbers."""
RESULT = "evaluation.json"
BASE, NEW, RELEASED = "base", "new", "released"
"""Names of the models in an evaluation."""


def evaluation_key(
    adapter: str,
    dataset_version: str,
    in_use: str | None,
    recipe: Recipe,
    number_format: str,
    eval_sets: Mapping[str, EvalSet],
    released_before: bool = False,
    withdrawn: bool = False,
    learned: Collection[str] = (),
) -> str:
    """Return the key of an evaluation: a hash of what was compared, on which texts and how.

    Held-out sections that the adapter in use was trained on (`learned`) are in the key only if there are any, because
    earlier versions did not leave them out.

    Numbers that were computed in different formats never have the same key. If the recipe names the format, it is in
    the adapter's key. If the format is left to the machine, only formats other than bfloat16 are in this key, so that
    keys from before there was a choice stay valid.
    """
    computed_in = {} if recipe.base.dtype != AUTO or number_format == "bfloat16" else {"computed_in": number_format}
    return digest(
        {
            **computed_in,
            **({"learned": sorted(learned)} if learned else {}),
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
    """Return the options of the measurements. Eval sets count by their content, not by their folder."""
    options = recipe.evaluation.for_keys(exclude=("general", "chat"))
    return [options, {kind: found.version for kind, found in eval_sets.items()}]


def measured_by(
    held_out_version: str, base: Mapping[str, str], recipe: Recipe, eval_sets: Mapping[str, EvalSet]
) -> str:
    """Return a hash of what decides the measurements of a model, so that equal evaluations do not measure it twice.

    Args:
        held_out_version: version of the dataset's held-out side.
        base: identity of the base model.
        recipe: recipe with its number format decided.
        eval_sets: eval sets by kind.
    """
    part = recipe.base.for_keys(include=("quantization", "dtype"))
    options = recipe.training.for_keys(include=("attention", "fused", "mixed_precision"))
    length = recipe.tokens.block_length  # eval sets are cut to it, too
    return digest([held_out_version, dict(base), part, options, length, _options(recipe, eval_sets), CODE_VERSION])


@dataclass(frozen=True)
class EvaluationRequest(ModelRequest):
    """A request to measure a base model and its adapters. The recipe's number format is decided."""

    dataset: str
    """Folder of the dataset artifact."""
    adapters: dict[str, str]
    """Name -> folder of the adapters to measure: `new`, and `released` if there is one on the same base."""
    known: dict[str, Any]
    """Name -> measurements of models that were measured before in the same way. A missing base is measured."""
    output: str
    """Folder to which evaluation.json is written."""
    offload: str
    locks: str
    """Folder of the locks through which only one process uses a device."""
    threads: int | None = None
    texts: dict[str, Any] = field(default_factory=dict)
    """Kind -> `files` and `folder` of an EvalSet."""

    def eval_sets(self) -> dict[str, EvalSet]:
        return {kind: EvalSet(kind, found["files"], Path(found["folder"])) for kind, found in self.texts.items()}


@dataclass(frozen=True)
class TalkRequest(ModelRequest):
    """A request to generate text with an adapter. The recipe is the adapter's."""

    adapter: str
    """Folder of the adapter."""
    offload: str
    prompt: str | None
    """Text that base and adapter continue or answer; None for a conversation."""
    as_chat: bool = False
    """Whether the prompt is a user's message instead of the beginning of a text."""
    as_json: bool = False
    new_tokens: int = 256
    temperature: float = 0.0
    """0 means greedy decoding: always the most probable token."""
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    seed: int | None = None


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """A request to merge an adapter into its base. The recipe is the adapter's, with its number format decided."""

    adapter: str
    """Folder of the adapter."""
    dataset: str | None
    """Folder of the dataset on whose held-out side the merge is measured; None if it no longer exists."""
    output: str
    """Folder to which the merged model is written."""
    offload: str
    threads: int | None = None
