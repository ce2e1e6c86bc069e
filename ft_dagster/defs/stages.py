"""The stages of the graph, in order: what each is made from, by which code, by which part of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg

from ft_dagster.corpus import index as index_room
from ft_dagster.corpus import sections as sections_room
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation import request as evaluation_room
from ft_dagster.recipe import Recipe
from ft_dagster.release import released as release_room
from ft_dagster.store import Artifact, Store, digest
from ft_dagster.tokens import dataset as tokens_room
from ft_dagster.training import request as training_room

REPORT_FILES = dg.AssetKey("report_files")
BASE_MODEL = dg.AssetKey("base_model")
ARTIFACT = "artifact"
"""Metadata of each materialization: the key of the artifact in the store."""
RECIPE = "recipe"
"""Metadata of each materialization: hash of the part of the recipe it was made by."""
CHECKS = "blocking checks"
"""Metadata of each materialization: `passed` or `failed`."""
BLOCKED = "a blocking check failed"
"""The reason of a stage whose inputs are the same as when its check failed: only a person can mend that."""
_DATA_VERSION_TAG = "dagster/data_version"
_CODE_VERSION_TAG = "dagster/code_version"
_INPUT_VERSION_TAG = "dagster/input_data_version/"


@dataclass(frozen=True)
class Stage:
    """One asset of the graph."""

    name: str
    parents: tuple[dg.AssetKey, ...]
    code_version: str
    recipe_parts: tuple[str, ...] = ()
    mirrors_parent: bool = False
    """Its data version is that of its parent, made by the same function: a look inside the run may be newer than
    the one that was recorded before it."""

    @property
    def key(self) -> dg.AssetKey:
        return dg.AssetKey(self.name)

    def recipe_hash(self, recipe: Recipe) -> str:
        """Hash of what the recipe says to this stage."""
        return digest(recipe.part(*self.recipe_parts))[:16]


def _key(name: str) -> dg.AssetKey:
    return dg.AssetKey(name)


RAW_CHAPTERS = Stage("raw_chapters", (REPORT_FILES,), index_room.CODE_VERSION, mirrors_parent=True)
SECTIONS = Stage("sections", (_key("raw_chapters"),), sections_room.CODE_VERSION, ("corpus",))
TOKENIZED_DATASET = Stage("tokenized_dataset", (_key("sections"), BASE_MODEL), tokens_room.CODE_VERSION, ("tokens",))
LORA_ADAPTER = Stage(
    "lora_adapter",
    (_key("tokenized_dataset"), BASE_MODEL),
    training_room.CODE_VERSION,
    ("base", "lora", "training"),
)
ADAPTER_EVALUATION = Stage(
    "adapter_evaluation",
    (_key("lora_adapter"), _key("tokenized_dataset")),
    evaluation_room.CODE_VERSION,
    ("evaluation", "release"),
)
RELEASED_ADAPTER = Stage("released_adapter", (_key("adapter_evaluation"),), release_room.CODE_VERSION)
NOTHING = "none"
"""Data version of released_adapter while no adapter is released."""
STAGES = (RAW_CHAPTERS, SECTIONS, TOKENIZED_DATASET, LORA_ADAPTER, ADAPTER_EVALUATION, RELEASED_ADAPTER)


def _artifact_kind(stage: Stage) -> str:
    """What the store calls a stage's artifact: a release is of an evaluation's verdict."""
    return ADAPTER_EVALUATION.name if stage == RELEASED_ADAPTER else stage.name


def latest_materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    """The last materialization of an asset, if there is one."""
    event = instance.get_latest_materialization_event(key)
    return event.asset_materialization if event else None


def data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version of an asset's last materialization."""
    found = latest_materialization(instance, key)
    return (found.tags or {}).get(_DATA_VERSION_TAG) if found else None


def reason_stale(instance: dg.DagsterInstance, stage: Stage, workspace: Workspace) -> str | None:
    """Why a stage must be made again, or None: what it was made from against what is there now.

    This asks about levels, not about events, so that no change is lost and none counts twice. It reads only the
    tags and metadata of last materializations, whether the store has the artifact, and what is released.
    """
    recipe = workspace.recipe
    last = latest_materialization(instance, stage.key)
    if last is None:
        return "never materialized"
    tags = last.tags or {}
    if tags.get(_CODE_VERSION_TAG) != stage.code_version:
        return "its code changed"
    made_by = last.metadata.get(RECIPE)
    if made_by is not None and made_by.value != stage.recipe_hash(recipe):
        return f"the recipe changed ({', '.join(stage.recipe_parts)})"
    for parent in stage.parents:
        made_from = _DATA_VERSION_TAG if stage.mirrors_parent else _INPUT_VERSION_TAG + parent.to_user_string()
        if data_version(instance, parent) != tags.get(made_from):
            return f"{parent.to_user_string()} has new content"
    if workspace.store.find(_artifact_kind(stage), str(last.metadata[ARTIFACT].value)) is None:
        return "its artifact is missing from the store"
    if stage == RELEASED_ADAPTER and (workspace.releases.current() or NOTHING) != tags.get(_DATA_VERSION_TAG):
        return "fine_tuned_model is not what was released"
    return BLOCKED if _is_blocked(last) else None


def stale_stages(instance: dg.DagsterInstance, workspace: Workspace) -> list[tuple[Stage, str]]:
    """Stages that must be made again, each with its reason; those below the first may turn out unchanged."""
    stale: list[tuple[Stage, str]] = []
    for stage in STAGES:
        if reason := reason_stale(instance, stage, workspace):
            stale.append((stage, reason))
        elif above := [parent for parent, _ in stale if parent.key in stage.parents]:
            stale.append((stage, f"{above[0].name} may change"))
    return stale


def cause_of(instance: dg.DagsterInstance, recipe: Recipe) -> str:
    """Hash of what decides what there should be: external contents, recipe, code. The same cause, the same outcome."""
    contents = [data_version(instance, key) for key in (REPORT_FILES, BASE_MODEL)]
    stages = [[stage.name, stage.code_version, stage.recipe_hash(recipe)] for stage in STAGES]
    return digest([contents, stages])[:32]


def input_artifact(context: dg.AssetExecutionContext, parent: Stage, store: Store) -> Artifact:
    """The artifact that an asset's parent made last, its bytes checked.

    Raises:
        Failure: the parent has not been materialized.
        StoreError: the artifact is missing from the store, or damaged.
    """
    found = latest_materialization(context.instance, parent.key)
    if found is None or ARTIFACT not in found.metadata:
        raise dg.Failure(f"{parent.name} has not been materialized. Materialize it first, or run `ft-dagster run`.")
    if _is_blocked(found):
        raise dg.Failure(f"A blocking check of {parent.name} failed; see its checks, mend the cause, materialize it.")
    return store.get(parent.name, str(found.metadata[ARTIFACT].value))


def _is_blocked(materialization: dg.AssetMaterialization) -> bool:
    checks = materialization.metadata.get(CHECKS)
    return checks is not None and checks.value == "failed"


def describe(
    stage: Stage,
    artifact: Artifact,
    recipe: Recipe,
    version: str,
    metadata: dict[str, dg.MetadataValue | str | int | float | bool],
    checks: Sequence[dg.AssetCheckResult] = (),
) -> dg.MaterializeResult:
    """What an asset returns: its data version, and the metadata that later stages and `reason_stale` read."""
    return dg.MaterializeResult(
        asset_key=stage.key,
        data_version=dg.DataVersion(version),
        metadata={
            "recipe name": recipe.name,
            **metadata,
            ARTIFACT: artifact.key,
            RECIPE: stage.recipe_hash(recipe),
            CHECKS: "passed" if all(check.passed for check in checks) else "failed",
        },
        check_results=list(checks),
    )
