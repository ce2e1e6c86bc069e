"""Find the evaluation of an adapter that was made before in the same way, or have a process make it.

Imports no torch.
"""

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.dataset.dataset import folder_with_rows, held_out_sections, held_out_version
from ft_dagster.evaluation.eval_sets import EvalSet
from ft_dagster.evaluation.gate import judge, judge_refit
from ft_dagster.evaluation.request import (
    BASE,
    KIND,
    NEW,
    RELEASED,
    RESULT,
    EvaluationRequest,
    evaluation_key,
    measured_by,
)
from ft_dagster.model.manifest import differences, read_manifest, stored_manifest
from ft_dagster.store.local import Artifact, Store

Said = TypeVar("Said")
"""What an evaluation process reports while it works."""


@dataclass(frozen=True)
class InUse:
    """The released adapter that a new one would replace."""

    folder: Path | None
    """Folder of the adapter; None if no adapter is released, or if the new adapter is."""
    new_was_proven: bool = False
    """Whether the new adapter was in use before, as the result of a measurement."""
    new_was_withdrawn: bool = False
    """Whether a person took the new adapter out of use."""


@dataclass(frozen=True)
class Asked:
    """What is evaluated, and how."""

    adapter: Artifact
    dataset: Artifact
    base: PreparedBase
    recipe: Recipe
    """The recipe of the workspace."""
    here: Recipe
    """The recipe with the number format of this machine."""
    eval_sets: Mapping[str, EvalSet]
    """The eval sets, by kind."""
    in_use: InUse


def find_or_evaluate(
    asked: Asked, settings: Settings, measure: Callable[[EvaluationRequest, str], Iterator[Said]]
) -> Generator[Said, None, Artifact]:
    """Find the evaluation in the store, or measure, judge the adapter by the measurements, and commit the evaluation.

    If an earlier evaluation measured the base or the adapter in use in the same way, they are not measured again.

    Args:
        asked: what is evaluated.
        settings: settings that say where logs, locks and offloaded layers are.
        measure: carries out a request in a process; its second argument is the evaluation's key.

    Raises:
        AdapterError: the manifest of the adapter in use is missing or damaged.
    """
    store, in_use = asked.adapter.store, asked.in_use
    learned = _learned(asked.dataset, asked.adapter, in_use)
    key = evaluation_key(
        asked.adapter.key,
        asked.dataset.about["version"],
        in_use.folder.name if in_use.folder else None,
        asked.recipe,
        asked.here.compute_dtype,
        asked.eval_sets,
        in_use.new_was_proven,
        in_use.new_was_withdrawn,
        learned,
    )
    released = in_use.folder if in_use.folder and not differences(read_manifest(in_use.folder), asked.base) else None
    if found := store.find(KIND, key):
        return found
    measured = measured_by(held_out_version(asked.dataset), asked.base.identity, asked.here, asked.eval_sets)
    with store.staging() as folder:
        known = _measured_before(store, measured, released, asked.eval_sets)
        yield from measure(_request(asked, settings, folder, known, released), key)
        return commit(key, folder, asked.adapter, in_use, asked.here, measured, learned)


def find_or_check_refit(
    asked: Asked, settings: Settings, measure: Callable[[EvaluationRequest, str], Iterator[Said]]
) -> Generator[Said, None, Artifact]:
    """Find in the store what was measured on a refit, or measure general text, conversations and recitation on it.

    Args:
        asked: the refit, and the dataset that it was trained on; `in_use` is empty.
        settings: as in `find_or_evaluate`.
        measure: as in `find_or_evaluate`.

    Returns:
        An artifact whose `about` contains `models`, `adapter` and `verdict`, which says whether the refit is released.
    """
    store = asked.adapter.store
    version, number_format = asked.dataset.about["version"], asked.here.compute_dtype
    key = evaluation_key(asked.adapter.key, version, None, asked.recipe, number_format, asked.eval_sets)
    if found := store.find(KIND, key):
        return found
    with store.staging() as folder:
        yield from measure(_request(asked, settings, folder, {}, None), key)
        result = json.loads((folder / RESULT).read_bytes())
        verdict = judge_refit(result["models"], asked.here.release, _not_measured(result, asked.here))
        about = result | {
            "models": {name: _without_sections(model) for name, model in result["models"].items()},
            "adapter": asked.adapter.key,
            "verdict": verdict.to_json(),
        }
        return store.commit(KIND, key, folder, about)


def _learned(dataset: Artifact, adapter: Artifact, in_use: InUse) -> set[str]:
    """Return the held-out sections that the adapter in use was trained on, for example under another chapter's name.

    Those that the new adapter knows, too, because it continued from the one in use, do not make the comparison unfair.
    """
    if in_use.folder is None:
        return set()
    known, new = (
        {item["section"] for item in manifest.trained_on}
        for manifest in (read_manifest(in_use.folder), stored_manifest(adapter))
    )
    return held_out_sections(dataset) & known - new


def _measured_before(store: Store, measured: str, released: Path | None, kinds: Collection[str]) -> dict[str, Any]:
    """Return measurements of the base, and of the adapter in use, that an earlier evaluation made in the same way."""
    base = store.newest(KIND, measured=measured)
    own = store.newest(KIND, measured=measured, adapter=released.name) if released else None
    found = {BASE: _model(base, BASE, kinds), RELEASED: _model(own, NEW, kinds)}
    return {name: model for name, model in found.items() if model is not None}


def _model(evaluation: Artifact | None, name: str, kinds: Collection[str]) -> dict[str, Any] | None:
    """Return the measurements of a model, unless an earlier version left out an eval set without a reason."""
    if evaluation is None:
        return None
    result = evaluation.read_json(RESULT)
    model: dict[str, Any] = result["models"][name]
    return model if set(kinds) <= {*model, *result.get("not_measured", {})} else None


def _request(
    asked: Asked, settings: Settings, output: Path, known: dict[str, Any], released: Path | None
) -> EvaluationRequest:
    adapters = {NEW: str(asked.adapter.path)}
    if released and RELEASED not in known:
        adapters[RELEASED] = str(released)
    return EvaluationRequest(
        base=asked.base.to_json(),
        dataset=str(folder_with_rows(asked.dataset)),
        recipe=asked.here.model_dump(mode="json"),
        adapters=adapters,
        known=known,
        texts={kind: {"files": dict(s.files), "folder": str(s.folder)} for kind, s in asked.eval_sets.items()},
        output=str(output),
        offload=str(settings.offload),
        locks=str(settings.cache / "locks"),
        threads=settings.threads,
    )


def commit(
    key: str,
    folder: Path,
    adapter: Artifact,
    in_use: InUse,
    recipe: Recipe,
    measured: str,
    learned: Collection[str] = (),
) -> Artifact:
    """Judge an adapter by its measurements, and commit them with the verdict to its store.

    Args:
        key: key of the evaluation.
        folder: folder that contains RESULT.
        adapter: the new adapter.
        in_use: the adapter that it would replace.
        recipe: recipe with the number format in which the models were measured.
        measured: hash of what decided the measurements, from `measured_by`.
        learned: held-out sections that the adapter in use was trained on.
    """
    result = json.loads((folder / RESULT).read_bytes())
    models, release = result["models"], recipe.release
    other_base = in_use.folder is not None and RELEASED not in models and not release.other_base
    missing = _not_measured(result, recipe)
    verdict = judge(
        models, release, in_use.new_was_proven, other_base, in_use.new_was_withdrawn, missing, learned
    ).to_json()
    about = result | {
        "models": {name: _without_sections(model) for name, model in models.items()},
        "adapter": adapter.key,
        "in_use": in_use.folder.name if in_use.folder else None,
        "verdict": verdict,
        "measured": measured,
        "number_format": recipe.compute_dtype,
    }
    return adapter.store.commit(KIND, key, folder, about)


def _not_measured(result: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """Return what the recipe asks for and the evaluation could not measure, with the reason."""
    found, new = dict(result.get("not_measured", {})), result["models"][NEW]
    if recipe.evaluation.chat is not None and "chat" not in new:
        found.setdefault("chat", "the base model has no chat template")
    if not new["train"]["passages"]:
        found["recited"] = "no text trained on is long enough for a passage"
    return found


def _without_sections(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return measurements without those of each section, which are rarely needed and stay in the artifact's file."""
    return {
        name: _without_sections(value) if name in ("general", "chat") else value
        for name, value in measured.items()
        if name != "sections"
    }
