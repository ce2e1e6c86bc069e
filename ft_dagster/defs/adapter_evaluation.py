"""The asset adapter_evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base import prepare_base
from ft_dagster.defs.child_process import ChildProcess
from ft_dagster.defs.lora_adapter import WEIGHTS
from ft_dagster.defs.pictures import table
from ft_dagster.defs.stages import ADAPTER_EVALUATION, LORA_ADAPTER, TOKENIZED_DATASET, describe, input_artifact
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
from ft_dagster.evaluation.request import RESULT, EvaluationRequest, evaluation_key
from ft_dagster.evaluation.verdict import judge
from ft_dagster.recipe import Recipe
from ft_dagster.store import Artifact, Store, digest

MANIFEST = "manifest.json"


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
    released = _released_on(workspace, base.identity, adapter.key)
    before = released is not None and adapter.key in {entry["adapter"] for entry in workspace.releases.history()}
    key = evaluation_key(
        adapter.files[WEIGHTS], dataset.about["version"], released.name if released else None, recipe, before
    )
    artifact = store.find(ADAPTER_EVALUATION.name, key)
    if artifact is None:
        with store.staging() as folder:
            adapters = {"new": str(adapter.path)} | ({"released": str(released)} if released else {})
            request = EvaluationRequest(
                base=base.to_json(),
                dataset=str(dataset.path),
                recipe=recipe.model_dump(mode="json"),
                adapters=adapters,
                output=str(folder),
                offload=str(settings.offload),
                threads=settings.threads,
            )
            path = request.write(folder / "request.json")
            yield from child_process.run(
                context, "ft_dagster.evaluation", path, settings.logs / f"evaluation-{key[:12]}.log"
            )
            path.unlink()
            artifact = _take_in(store, key, folder, adapter, released, recipe, before)
    yield _describe(artifact, recipe)


def _released_on(workspace: Workspace, base: dict[str, str], new: str) -> Path | None:
    """The released adapter, if it is another one than the new one and on the same base."""
    folder = workspace.releases.current_folder()
    if folder is None or folder.name == new:
        return None
    manifest = json.loads((folder / MANIFEST).read_bytes())
    return folder if manifest["base"] == base else None


def _take_in(
    store: Store, key: str, folder: Path, adapter: Artifact, released: Path | None, recipe: Recipe, before: bool
) -> Artifact:
    result = json.loads((folder / RESULT).read_bytes())
    verdict = judge(result["models"], recipe.release.minimum_gain, before).to_json()
    about = result | {"adapter": adapter.key, "released": released.name if released else None, "verdict": verdict}
    return store.take_in(ADAPTER_EVALUATION.name, key, folder, about)


def _describe(artifact: Artifact, recipe: Recipe) -> dg.MaterializeResult:
    about = artifact.about
    models, verdict = about["models"], about["verdict"]
    version = digest([about["adapter"], {name: m["bits_per_byte"] for name, m in models.items()}, verdict])
    numbers: dict[str, Any] = {f"bits per byte: {name}": m["bits_per_byte"] for name, m in models.items()}
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
