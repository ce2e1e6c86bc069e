"""The asset adapter_evaluation."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base import PreparedBase, chat_template, prepare_base
from ft_dagster.defs.child_process import ChildProcess
from ft_dagster.defs.pictures import table
from ft_dagster.defs.stage_asset import stage_asset
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    LORA_ADAPTER,
    TOKENIZED_DATASET,
    as_shown,
    describe,
    input_artifact,
)
from ft_dagster.defs.workspace import GPU_POOL, Workspace
from ft_dagster.evaluation.request import (
    BASE,
    NEW,
    RELEASED,
    RESULT,
    EvaluationRequest,
    evaluation_key,
    measured_by,
)
from ft_dagster.evaluation.slices import load_slices
from ft_dagster.evaluation.verdict import judge
from ft_dagster.hashing import digest
from ft_dagster.recipe import Recipe
from ft_dagster.store import Artifact, Store
from ft_dagster.tokens.dataset import folder_with_rows, held_out_version
from ft_dagster.training.manifest import AdapterError, differences, read_manifest
from ft_dagster.training.number_format import resolved_here

_CHECKS = {
    "it_beats_base_and_released": (
        ("minimum_gain", "worst_loss"),
        "Held-out chapters are predicted better than by the base, and no worse than by the adapter in use "
        "(`release.minimum_gain`, `release.worst_loss`).",
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
        "Of the passages trained on, at most `release.recited` more than by the base are recited word for word.",
    ),
}
"""Name of a check -> fields of the recipe whose rules it shows, and what it says. Those that are not met keep the
adapter back."""


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
    """What base, released and new adapter are worth on held-out chapters, general text and chat; and the verdict."""
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    adapter = input_artifact(context, LORA_ADAPTER, store)
    dataset = input_artifact(context, TOKENIZED_DATASET, store)
    base = prepare_base(recipe.base, settings.cache, token=settings.token)
    in_use = _other_in_use(workspace, adapter.key)
    released = in_use if in_use and _fits(in_use, base) else None
    before = in_use is not None and adapter.key in workspace.releases.proven()
    withdrawn = in_use is not None and adapter.key in workspace.releases.withdrawn()
    slices = load_slices(recipe.evaluation, settings.workspace, bool(chat_template(Path(base.folder))))
    beside = in_use.name if in_use else None
    here = resolved_here(recipe, settings)
    number_format = here.compute_dtype
    key = evaluation_key(
        adapter.key, dataset.about["version"], beside, recipe, number_format, slices, before, withdrawn
    )
    artifact = store.find(ADAPTER_EVALUATION.name, key)
    if artifact is None:
        measured = measured_by(held_out_version(dataset), base.identity, here, slices)
        known = _measured_before(store, measured, released)
        with store.staging() as folder:
            unknown = released if released and "released" not in known else None
            adapters = {"new": str(adapter.path)} | ({"released": str(unknown)} if unknown else {})
            request = EvaluationRequest(
                base=base.to_json(),
                dataset=str(folder_with_rows(dataset)),
                recipe=here.model_dump(mode="json"),
                adapters=adapters,
                known=known,
                texts={kind: {"files": dict(s.files), "folder": str(s.folder)} for kind, s in slices.items()},
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
            artifact = _take_in(store, key, folder, adapter, in_use, here, before, withdrawn, measured)
    yield _describe(artifact, recipe, adapter)


def _measured_before(store: Store, measured: str, released: Path | None) -> dict[str, Any]:
    """Measurements of the base, and of the adapter in use, that an earlier evaluation made in the same way."""
    known = {}
    if base := store.newest(ADAPTER_EVALUATION.name, measured=measured):
        known[BASE] = _models(base)[BASE]
    if released and (own := store.newest(ADAPTER_EVALUATION.name, measured=measured, adapter=released.name)):
        known[RELEASED] = _models(own)[NEW]
    return known


def _models(evaluation: Artifact) -> dict[str, Any]:
    return evaluation.read_json(RESULT)["models"]


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
    withdrawn: bool,
    measured: str,
) -> Artifact:
    result = json.loads((folder / RESULT).read_bytes())
    models = result["models"]
    other_base = in_use is not None and RELEASED not in models and not recipe.release.other_base
    verdict = judge(models, recipe.release, before, other_base, withdrawn).to_json()
    about = result | {
        "models": {name: _without_sections(model) for name, model in models.items()},
        "adapter": adapter.key,
        "in_use": in_use.name if in_use else None,
        "verdict": verdict,
        "measured": measured,
        "number_format": recipe.compute_dtype,
    }
    return store.take_in(ADAPTER_EVALUATION.name, key, folder, about)


def _without_sections(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is looked at often; the measurements of each section stay in the artifact's file."""
    return {
        name: _without_sections(value) if name in ("general", "chat") else value
        for name, value in measured.items()
        if name != "sections"
    }


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
            "rules": table(_rule_rows(verdict["rules"])),
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


def _rule_rows(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "rule": rule["name"],
            "measured": f"{rule['measured']:.4f}",
            "interval": "" if rule["low"] is None else f"{rule['low']:.4f} to {rule['high']:.4f}",
            "asked": f"{rule['sense']} {rule['threshold']:g}" + (" at the lower end" * (rule["compared"] == "low")),
            "recipe": f"release.{rule['field']}",
            "passed": rule["passed"],
        }
        for rule in rules
    ]


def _beside(models: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the texts beside the reports and of the text trained on, to follow over time."""
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
