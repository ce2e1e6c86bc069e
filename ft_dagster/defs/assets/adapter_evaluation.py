"""The asset adapter_evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base.model_folder import chat_template
from ft_dagster.config.recipe import Recipe
from ft_dagster.defs.assets.pictures import table
from ft_dagster.defs.assets.processes import base_for_training, evaluation_process
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    LORA_ADAPTER,
    TOKENIZED_DATASET,
    as_shown,
    describe,
    input_artifact,
)
from ft_dagster.defs.workspace import GPU_POOL, Workspace
from ft_dagster.evaluation.eval_sets import load_eval_sets
from ft_dagster.evaluation.find_or_evaluate import Asked, InUse, find_or_evaluate
from ft_dagster.evaluation.request import BASE, NEW
from ft_dagster.model.manifest import AdapterError
from ft_dagster.runtime.number_format import resolved_here
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Artifact

_CHECKS = {
    "it_beats_base_and_released": (
        ("minimum_held_out", "minimum_gain", "worst_loss"),
        "Held-out chapters, of which there is enough text, are predicted better than by the base model, and no worse "
        "than by the released adapter (`release.minimum_held_out`, `release.minimum_gain`, `release.worst_loss`).",
    ),
    "general_text_is_not_forgotten": (
        ("general_loss",),
        "Bits per byte of general text rise by at most `release.general_loss`.",
    ),
    "instructions_are_still_followed": (
        ("chat_loss",),
        "Bits per byte of answers in conversations rise by at most `release.chat_loss`.",
    ),
    "text_is_not_recited": (
        ("recited",),
        "The share of training passages recited word for word is at most `release.recited` above the base model's.",
    ),
}
"""Name of a check -> the recipe fields whose rules it shows, and its description. An adapter that does not meet one of
the rules is not released."""


@stage_asset(
    ADAPTER_EVALUATION,
    kinds={"pytorch"},
    check_specs=[
        dg.AssetCheckSpec(name, asset=ADAPTER_EVALUATION.key, description=description)
        for name, (_, description) in _CHECKS.items()
    ],
    pool=GPU_POOL,
)
def adapter_evaluation(
    context: dg.AssetExecutionContext, workspace: Workspace, child_process: ChildProcess
) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
    """Scores of the base, the released and the new adapter on held-out chapters, general text and chat; the verdict."""
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    adapter = input_artifact(context, LORA_ADAPTER, store)
    dataset = input_artifact(context, TOKENIZED_DATASET, store)
    base = yield from base_for_training(context, workspace, child_process, recipe)
    eval_sets = load_eval_sets(recipe.evaluation, settings.workspace, bool(chat_template(Path(base.folder))))
    here = resolved_here(recipe, settings)
    asked = Asked(adapter, dataset, base, recipe, here, eval_sets, _in_use(workspace, adapter.key))

    measure = evaluation_process(context, settings, child_process)
    try:
        artifact = yield from find_or_evaluate(asked, settings, measure)
    except AdapterError as error:
        folder = asked.in_use.folder
        raise dg.Failure(f"{error} Or remove {folder} and the link fine_tuned_model to start over.") from error
    yield _describe(artifact, recipe, adapter)


def _in_use(workspace: Workspace, new: str) -> InUse:
    """Return the released adapter, if it is not the new one."""
    releases = workspace.releases
    folder = releases.measured_folder(workspace.store)
    if folder is None or folder.name == new:
        return InUse(None)
    return InUse(folder, new in releases.proven(), new in releases.withdrawn())


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
            "decision": verdict["decision"],
            "reason": verdict["reason"],
            **numbers,
            "gain over base": models["base"]["bits_per_byte"] - models["new"]["bits_per_byte"],
            "bits per byte by chapter": table(_chapter_rows(models)),
            "rules": table(_rule_rows(verdict)),
            "samples": table(_sample_rows(models)),
            **_beside(models),
            "held-out bytes": models["new"]["bytes"],
            **({"number format": about["number_format"]} if "number_format" in about else {}),
            "seconds": about["seconds"],
            **{f"seconds: {part}": seconds for part, seconds in about["seconds_by_part"].items()},
            "share of training and evaluation": about["seconds"]
            / (about["seconds"] + adapter.about["seconds_since_resume"]),
            "longest passage recited": models[NEW]["train"]["longest"]["text"],
        },
        [
            _check(name, [rule for rule in verdict["rules"] if rule["field"] in fields])
            for name, (fields, _) in _CHECKS.items()
        ],
    )


def _check(name: str, rules: Sequence[Mapping[str, Any]]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=ADAPTER_EVALUATION.key,
        passed=all(rule["passed"] for rule in rules),
        severity=dg.AssetCheckSeverity.WARN,
        metadata={f"{rule['name']} ({rule['field']})": as_shown(rule["measured"]) for rule in rules}
        or {"measured": "nothing"},
    )


def _rule_rows(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    applied = [
        {
            "rule": rule["name"],
            "measured": f"{rule['measured']:.4f}",
            "interval": "" if rule["low"] is None else f"{rule['low']:.4f} to {rule['high']:.4f}",
            "asked": f"{rule['sense']} {rule['threshold']:g}" + (" at the lower end" * (rule["compared"] == "low")),
            "recipe": f"release.{rule['field']}",
            "passed": rule["passed"],
        }
        for rule in verdict["rules"]
    ]
    missing = verdict.get("not_measured", {})  # stored evaluations of earlier versions lack it
    empty = dict.fromkeys(("interval", "asked", "recipe", "passed"), "")
    return applied + [{"rule": name, "measured": f"not measured: {reason}"} | empty for name, reason in missing.items()]


def _beside(models: Mapping[str, Any]) -> dict[str, float]:
    """Return figures of the general texts, the conversations and the training text, to follow over time."""
    figures = {
        f"bits per byte of {text}: {name}": model[kind]["bits_per_byte"]
        for kind, text in (("general", "general text"), ("chat", "answers"))
        for name, model in models.items()
        if kind in model
    }
    new, base = models[NEW]["train"], models[BASE]["train"]
    for name, on_train in ((BASE, base), (NEW, new)):
        if on_train["passages"]:
            figures[f"share of passages recited: {name}"] = on_train["recited"] / on_train["passages"]
    learned = 1 - new["nats_per_token"] / base["nats_per_token"]
    carried = 1 - models[NEW]["bits_per_byte"] / models[BASE]["bits_per_byte"]
    return figures | {"over-fit: gain on train less gain on held-out": learned - carried}


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
