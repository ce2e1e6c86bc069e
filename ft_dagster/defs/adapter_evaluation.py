"""The asset adapter_evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base import PreparedBase, prepare_base
from ft_dagster.defs.child_process import ChildProcess
from ft_dagster.defs.pictures import table
from ft_dagster.defs.stages import ADAPTER_EVALUATION, LORA_ADAPTER, TOKENIZED_DATASET, describe, input_artifact
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
from ft_dagster.evaluation.request import RESULT, EvaluationRequest, evaluation_key, measured_by
from ft_dagster.evaluation.verdict import judge
from ft_dagster.recipe import Recipe
from ft_dagster.store import Artifact, Store, digest
from ft_dagster.tokens.dataset import held_out_version
from ft_dagster.training.manifest import AdapterError, differences, read_manifest


@dg.asset(
    deps=ADAPTER_EVALUATION.parents,
    code_version=ADAPTER_EVALUATION.code_version,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"pytorch"},
    pool="gpu",
)
def adapter_evaluation(
    context: dg.AssetExecutionContext, workspace: Workspace, child_process: ChildProcess
) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
    """Bits per byte on held-out chapters for the base, the released adapter and the new one; samples; the verdict."""
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    adapter = input_artifact(context, LORA_ADAPTER, store)
    dataset = input_artifact(context, TOKENIZED_DATASET, store)
    base = prepare_base(recipe.base, settings.cache, token=settings.token)
    in_use = _other_in_use(workspace, adapter.key)
    released = in_use if in_use and _fits(in_use, base) else None
    before = in_use is not None and adapter.key in {entry["adapter"] for entry in workspace.releases.history()}
    key = evaluation_key(adapter.key, dataset.about["version"], in_use.name if in_use else None, recipe, before)
    artifact = store.find(ADAPTER_EVALUATION.name, key)
    if artifact is None:
        measured = measured_by(held_out_version(dataset), base.identity, recipe)
        known = _measured_before(store, measured, released)
        with store.staging() as folder:
            unknown = released if released and "released" not in known else None
            adapters = {"new": str(adapter.path)} | ({"released": str(unknown)} if unknown else {})
            request = EvaluationRequest(
                base=base.to_json(),
                dataset=str(dataset.path),
                recipe=recipe.model_dump(mode="json"),
                adapters=adapters,
                known=known,
                output=str(folder),
                offload=str(settings.offload),
                locks=str(settings.cache / "locks"),
                threads=settings.threads,
            )
            path = request.write(folder / "request.json")
            yield from child_process.run(
                context, "ft_dagster.evaluation", path, settings.logs / f"evaluation-{key[:12]}.log"
            )
            path.unlink()
            artifact = _take_in(store, key, folder, adapter, in_use, recipe, before, measured)
    yield _describe(artifact, recipe, adapter)


def _measured_before(store: Store, measured: str, released: Path | None) -> dict[str, Any]:
    """Measurements of the base, and of the adapter in use, that an earlier evaluation made in the same way."""
    known = {}
    if base := store.newest(ADAPTER_EVALUATION.name, measured=measured):
        known["base"] = base.about["models"]["base"]
    if released and (own := store.newest(ADAPTER_EVALUATION.name, measured=measured, adapter=released.name)):
        known["released"] = own.about["models"]["new"]
    return known


def _other_in_use(workspace: Workspace, new: str) -> Path | None:
    """Folder of the released adapter, if it is another one than the new one."""
    folder = workspace.releases.current_folder()
    return folder if folder is not None and folder.name != new else None


def _fits(adapter: Path, base: PreparedBase) -> bool:
    try:
        return not differences(read_manifest(adapter), base)
    except AdapterError as error:
        raise dg.Failure(f"{error} Or remove {adapter} and the link fine_tuned_model to release anew.") from error


def _take_in(
    store: Store,
    key: str,
    folder: Path,
    adapter: Artifact,
    in_use: Path | None,
    recipe: Recipe,
    before: bool,
    measured: str,
) -> Artifact:
    result = json.loads((folder / RESULT).read_bytes())
    other_base = in_use is not None and "released" not in result["models"] and not recipe.release.other_base
    verdict = judge(result["models"], recipe.release.minimum_gain, before, other_base).to_json()
    about = result | {
        "adapter": adapter.key,
        "in_use": in_use.name if in_use else None,
        "verdict": verdict,
        "measured": measured,
    }
    return store.take_in(ADAPTER_EVALUATION.name, key, folder, about)


def _describe(artifact: Artifact, recipe: Recipe, adapter: Artifact) -> dg.MaterializeResult:
    about = artifact.about
    models, verdict = about["models"], about["verdict"]
    version = digest([about["adapter"], {name: m["bits_per_byte"] for name, m in models.items()}, verdict])
    numbers: dict[str, Any] = {f"bits per byte: {name}": m["bits_per_byte"] for name, m in models.items()}
    for name, measured in models.items():
        if "rewrite_bits_per_byte" in measured:
            numbers[f"bits per byte of rewritten text: {name}"] = measured["rewrite_bits_per_byte"]
    return describe(
        ADAPTER_EVALUATION,
        artifact,
        recipe,
        version,
        {
            **numbers,
            "gain over base": models["base"]["bits_per_byte"] - models["new"]["bits_per_byte"],
            "decision": verdict["decision"],
            "reason": verdict["reason"],
            "held-out bytes": models["new"]["bytes"],
            "seconds": about["seconds"],
            **{f"seconds: {part}": seconds for part, seconds in about["seconds_by_part"].items()},
            "share of training and evaluation": about["seconds"]
            / (about["seconds"] + adapter.about["seconds_since_resume"]),
            "bits per byte by chapter": table(_chapter_rows(models)),
            "samples": table(_sample_rows(models)),
        },
    )


def _chapter_rows(models: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"chapter": chapter, "bytes": row["bytes"]}
        | {name: model["chapters"][chapter]["bits_per_byte"] for name, model in models.items()}
        for chapter, row in models["new"]["chapters"].items()
    ]


def _sample_rows(models: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"prompt": sample["prompt"]} | {name: model["samples"][index]["text"] for name, model in models.items()}
        for index, sample in enumerate(models["new"]["samples"])
    ]
