"""The asset lora_adapter."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import dagster as dg

from ft_dagster.config.recipe import Recipe
from ft_dagster.corpus.chapter import natural_key
from ft_dagster.dataset.dataset import all_documents
from ft_dagster.dataset.packing import LEAK
from ft_dagster.defs.assets.pictures import loss_curve, table
from ft_dagster.defs.assets.processes import base_for_training, training_process
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.runs.state import REASON_TAG
from ft_dagster.defs.stages import (
    ARTIFACT,
    LORA_ADAPTER,
    TOKENIZED_DATASET,
    describe,
    input_artifact,
    latest_materialization,
)
from ft_dagster.defs.workspace import GPU_POOL, Workspace
from ft_dagster.model.manifest import AdapterError, read_manifest, stored_manifest
from ft_dagster.release.lineage import compare
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.find_or_train import Wanted, find_or_train, why_unusable
from ft_dagster.training.request import WEIGHTS

FINITE = dg.AssetCheckSpec(
    "loss_is_finite",
    asset=LORA_ADAPTER.key,
    blocking=True,
    description="The loss of every step is finite.",
)
RELOADS = dg.AssetCheckSpec(
    "adapter_reloads_and_differs_from_base",
    asset=LORA_ADAPTER.key,
    blocking=True,
    description="The saved weights, loaded again, equal the trained ones, and they change the base model's output.",
)
SUPERVISED = dg.AssetCheckSpec(
    "every_token_is_supervised_once_an_epoch",
    asset=LORA_ADAPTER.key,
    blocking=True,
    description="The tokens that reached the loss are those of the dataset, once per epoch.",
)
APART = dg.AssetCheckSpec(
    "pieces_in_a_row_do_not_see_each_other",
    asset=LORA_ADAPTER.key,
    blocking=True,
    description="In the trained model, the loss of a piece of text does not depend on the piece before it in its row.",
)


@stage_asset(
    LORA_ADAPTER,
    kinds={"pytorch", "huggingface"},
    check_specs=[FINITE, RELOADS, SUPERVISED, APART],
    pool=GPU_POOL,
)
def lora_adapter(
    context: dg.AssetExecutionContext, workspace: Workspace, child_process: ChildProcess
) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
    """LoRA weights for the base model, trained on the train side of the dataset, with a manifest of their origin.

    An adapter that was already made for the same dataset, base, recipe and code is reused, not trained again.
    """
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    dataset = input_artifact(context, TOKENIZED_DATASET, store)
    before = latest_materialization(context.instance, LORA_ADAPTER.key)
    base = yield from base_for_training(context, workspace, child_process, recipe)
    wanted = Wanted(dataset, base, recipe, workspace.releases.measured_folder(store))

    train = training_process(context, workspace, child_process, dataset, recipe)
    try:
        artifact, origin = yield from find_or_train(wanted, settings, train)
    except AdapterError as error:
        raise dg.Failure(str(error)) from error
    if origin != "trained":
        context.log.info(f"Adapter {artifact.key[:12]} was {origin}; it is reused.")
    artifact.verify()
    because = context.run.tags.get(REASON_TAG, "materialized by hand")
    history = {"because": because} | _since(before, artifact, store)
    yield _describe(artifact, recipe, origin == "made before", dataset, history)


def _estimated(estimate: dict[str, float | None]) -> dict[str, float]:
    """Return the estimates made before training, as metadata to compare with the measured values."""
    memory, seconds = estimate.get("memory_bytes"), estimate.get("seconds")
    found = {"estimated memory (GiB)": memory / 2**30 if memory else None, "estimated seconds": seconds}
    return {name: value for name, value in found.items() if value is not None}


def _since(before: dg.AssetMaterialization | None, artifact: Artifact, store: Store) -> dict[str, Any]:
    """Return what changed since the previously made adapter, as metadata."""
    earlier = (
        store.find(LORA_ADAPTER.name, str(before.metadata[ARTIFACT].value))
        if before and ARTIFACT in before.metadata
        else None
    )
    if earlier is None:
        return {"since the one before": "there was none"}
    found = compare(stored_manifest(earlier), stored_manifest(artifact))
    changes = {name: ", ".join(getattr(found, name)) or "none" for name in ("added", "edited", "removed")}
    fields = [*found.recipe, *found.base, *found.made_by]
    return {
        "since the one before": earlier.key,
        **{f"chapters {name}": names for name, names in changes.items()},
        "recipe, base and code changed": table([asdict(change) for change in fields]),
    }


def _describe(
    artifact: Artifact, recipe: Recipe, reused: bool, dataset: Artifact, history: dict[str, Any]
) -> dg.MaterializeResult:
    about = artifact.about
    losses = [row["loss"] for row in about["history"]]
    trained_on = {document.chapter for document in all_documents(dataset) if document.split == "train"}
    return describe(
        LORA_ADAPTER,
        artifact,
        recipe,
        artifact.files[WEIGHTS],
        {
            "loss curve": loss_curve(about["history"]),
            "reused": reused,
            **history,
            "final loss": about["final_loss"],
            "steps": about["steps"],
            "kept step": about["kept_step"],
            "started from": read_manifest(artifact.path).started_from or "the base",
            "held-out bits per byte by step": table(about["held_out"]),
            "resumed from step": about["resumed_from"],
            "tokens since resume": about["tokens_since_resume"],
            "tokens per second": float(about["tokens_per_second"] or 0.0),
            "seconds since resume": about["seconds_since_resume"],
            "peak memory (GiB)": about["peak_memory_bytes"] / 2**30,
            **_estimated(about.get("estimate", {})),
            "trainable parameters": about["trainable_parameters"],
            "device": about["device"],
            **({"number format": about["number_format"]} if "number_format" in about else {}),
            "base": recipe.base.model,
            "folder": dg.MetadataValue.path(artifact.path),
            "chapters trained on": table([{"chapter": chapter} for chapter in sorted(trained_on, key=natural_key)]),
        },
        [
            dg.AssetCheckResult(
                check_name=FINITE.name,
                asset_key=LORA_ADAPTER.key,
                passed=bool(losses) and all(math.isfinite(loss) for loss in losses),
                metadata={"steps": len(losses)},
            ),
            dg.AssetCheckResult(
                check_name=RELOADS.name,
                asset_key=LORA_ADAPTER.key,
                passed=about["reloads"] and about["largest_logit_change"] > 0,
                description=why_unusable(about),
                metadata={"largest change of a logit": about["largest_logit_change"], "reloads": about["reloads"]},
            ),
            _supervised(artifact, recipe, dataset),
            _apart(artifact),
        ],
    )


def _apart(artifact: Artifact) -> dg.AssetCheckResult:
    leak = float(artifact.about.get("leak", 0.0))  # adapters of earlier versions lack it; their keys say "packed"
    return dg.AssetCheckResult(
        check_name=APART.name,
        asset_key=LORA_ADAPTER.key,
        passed=leak <= LEAK,
        metadata={"layout": artifact.about.get("layout", "packed"), "largest change of a loss (nats)": leak},
    )


def _supervised(artifact: Artifact, recipe: Recipe, dataset: Artifact) -> dg.AssetCheckResult:
    """Compare the tokens that reached the loss with the dataset. Where the training may cover only some rows or part of
    an epoch, fewer tokens are enough."""
    reached, epochs = artifact.about["supervised_tokens"], recipe.training.epochs
    in_dataset = dataset.about["splits"]["train"]["supervised_tokens"]
    in_part = bool(read_manifest(artifact.path).started_from) or epochs % 1 > 0 or recipe.training.patience is not None
    return dg.AssetCheckResult(
        check_name=SUPERVISED.name,
        asset_key=LORA_ADAPTER.key,
        passed=0 < reached <= in_dataset * math.ceil(epochs) if in_part else reached == in_dataset * epochs,
        metadata={"reached the loss": reached, "in the dataset": in_dataset, "epochs": epochs},
    )
