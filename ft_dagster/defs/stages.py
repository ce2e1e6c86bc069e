"""The stages of the graph, in order: what each is made from, by which code, by which part of the recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dagster as dg

from ft_dagster.config.recipe import Recipe
from ft_dagster.corpus import index as index_room
from ft_dagster.corpus import sections as sections_room
from ft_dagster.corpus import snapshot as snapshot_room
from ft_dagster.dataset import dataset as tokens_room
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation import request as evaluation_room
from ft_dagster.release import released as release_room
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training import request as training_room

REPORT_FILES = dg.AssetKey("report_files")
BASE_MODEL = dg.AssetKey("base_model")
ARTIFACT = "artifact"
"""Metadata of each materialization: the key of the artifact in the store."""
RECIPE = "recipe"
"""Metadata of each materialization: hash of the part of the recipe it was made by."""
CHECKS = "blocking checks"
"""Metadata of each materialization: `passed` or `failed`."""
_DATA_VERSION_TAG = "dagster/data_version"
_CODE_VERSION_TAG = "dagster/code_version"
_INPUT_VERSION_TAG = "dagster/input_data_version/"


External = Mapping[dg.AssetKey, str]


@dataclass(frozen=True)
class Reason:
    """Why a stage is stale."""

    kind: Literal["content", "recipe", "base", "code", "missing", "blocked", "upstream"]
    text: str

    def __str__(self) -> str:
        return self.text


BLOCKED = Reason("blocked", "a blocking check failed")
"""Of a stage whose inputs are the same as when its check failed: only a person can fix that."""


@dataclass(frozen=True)
class Stage:
    """One asset of the graph."""

    name: str
    parents: tuple[dg.AssetKey, ...]
    code_version: str
    recipe_parts: tuple[str, ...] = ()
    mirrors_parent: bool = False
    """Whether its data version is computed as its parent's is. This asset scans the reports again when it runs, so its
    version may be newer than the observation of its parent that was recorded before the run."""

    @property
    def key(self) -> dg.AssetKey:
        return dg.AssetKey(self.name)

    def recipe_hash(self, recipe: Recipe) -> str:
        """Hash of what the recipe says to this stage."""
        return digest(recipe.part(*self.recipe_parts))[:16]


RAW_CHAPTERS = Stage(snapshot_room.KIND, (REPORT_FILES,), index_room.CODE_VERSION, mirrors_parent=True)
SECTIONS = Stage(sections_room.KIND, (RAW_CHAPTERS.key,), sections_room.CODE_VERSION, ("corpus",))
TOKENIZED_DATASET = Stage(
    tokens_room.KIND, (SECTIONS.key, BASE_MODEL), tokens_room.CODE_VERSION, ("tokens", "objectives.taught")
)
LORA_ADAPTER = Stage(
    training_room.KIND,
    (TOKENIZED_DATASET.key, BASE_MODEL),
    training_room.CODE_VERSION,
    ("base", "objectives", "lora", "training"),
)
ADAPTER_EVALUATION = Stage(
    evaluation_room.KIND,
    (LORA_ADAPTER.key, TOKENIZED_DATASET.key),
    evaluation_room.CODE_VERSION,
    ("evaluation", "release"),
)
RELEASED_ADAPTER = Stage("released_adapter", (ADAPTER_EVALUATION.key,), release_room.CODE_VERSION)
NOTHING = "none"
"""Data version of released_adapter while no adapter is released."""
STAGES = (RAW_CHAPTERS, SECTIONS, TOKENIZED_DATASET, LORA_ADAPTER, ADAPTER_EVALUATION, RELEASED_ADAPTER)


def artifact_kind(stage: Stage) -> str:
    """What the store calls a stage's artifact: a release is of an evaluation's verdict."""
    return ADAPTER_EVALUATION.name if stage == RELEASED_ADAPTER else stage.name


def latest_materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    """The last materialization of an asset, if there is one."""
    event = instance.get_latest_materialization_event(key)
    return event.asset_materialization if event else None


Materializations = Mapping[dg.AssetKey, dg.AssetMaterialization]


def all_materializations(instance: dg.DagsterInstance) -> Materializations:
    """The last materialization of each asset of the graph that has one, in one query."""
    found = {}
    for record in instance.get_asset_records([REPORT_FILES, BASE_MODEL, *(stage.key for stage in STAGES)]):
        event = record.asset_entry.last_materialization
        if event is not None and event.asset_materialization is not None:
            found[record.asset_entry.asset_key] = event.asset_materialization
    return found


def data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """The data version of an asset's last materialization."""
    return version_of(latest_materialization(instance, key))


def version_of(found: dg.AssetMaterialization | None) -> str | None:
    """The data version of a materialization, if there is one."""
    return (found.tags or {}).get(_DATA_VERSION_TAG) if found else None


def input_version(materialization: dg.AssetMaterialization, parent: dg.AssetKey) -> str | None:
    """The data version of a parent that something was made from."""
    return (materialization.tags or {}).get(_INPUT_VERSION_TAG + parent.to_user_string())


def reason_stale(
    materializations: Materializations, stage: Stage, workspace: Workspace, recipe: Recipe, external: External
) -> Reason | None:
    """Why a stage must be made again, or None: what it was made from against what is there now.

    This asks about levels, not about events, so that no change is lost and none counts twice. It reads only the
    tags and metadata of last materializations, whether the store has the artifact, and what is released.

    Args:
        materializations: the last one of each asset.
        stage: the stage.
        workspace: store and releases.
        recipe: the workspace's.
        external: data versions of external assets as they are now, where they have not been recorded.
    """
    last = materializations.get(stage.key)
    if last is None:
        return Reason("missing", "never materialized")
    tags = last.tags or {}
    if tags.get(_CODE_VERSION_TAG) != stage.code_version:
        return Reason("code", "its code changed")
    made_by = last.metadata.get(RECIPE)
    if made_by is not None and made_by.value not in [stage.recipe_hash(reading) for reading in recipe.readings]:
        return Reason("recipe", f"the recipe changed ({', '.join(stage.recipe_parts)})")
    for parent in stage.parents:
        made_from = tags.get(_DATA_VERSION_TAG) if stage.mirrors_parent else input_version(last, parent)
        now = external.get(parent) or version_of(materializations.get(parent))
        if now != made_from:
            return Reason("base" if parent == BASE_MODEL else "content", f"{parent.to_user_string()} has new content")
    artifact = workspace.store.find(artifact_kind(stage), str(last.metadata[ARTIFACT].value))
    if artifact is None:
        return Reason("missing", "its artifact is missing from the store")
    by_hand = workspace.releases.chosen_by_hand()
    settled = by_hand and (stage == RELEASED_ADAPTER or _is_consumed(materializations, last))
    if stage in (ADAPTER_EVALUATION, RELEASED_ADAPTER) and not settled:
        released = workspace.releases.current()
        if stage == RELEASED_ADAPTER and (released or NOTHING) != tags.get(_DATA_VERSION_TAG):
            return Reason("missing", "fine_tuned_model is not what was released")
        if stage == ADAPTER_EVALUATION and released not in (None, artifact.about["in_use"], artifact.about["adapter"]):
            return Reason("content", "another adapter was released since")
    return BLOCKED if _is_blocked(last) else None


def _is_consumed(materializations: Materializations, evaluation: dg.AssetMaterialization) -> bool:
    """Whether the release looked at an evaluation already: what a person decides later does not question it."""
    release = materializations.get(RELEASED_ADAPTER.key)
    return release is not None and input_version(release, ADAPTER_EVALUATION.key) == version_of(evaluation)


def stale_stages(
    instance: dg.DagsterInstance, workspace: Workspace, external: External | None = None
) -> list[tuple[Stage, Reason]]:
    """Stages that must be made again, each with its reason; those below the first may turn out unchanged."""
    return stale_among(all_materializations(instance), workspace, workspace.recipe, external or {})


def stale_among(
    materializations: Materializations, workspace: Workspace, recipe: Recipe, external: External
) -> list[tuple[Stage, Reason]]:
    """The same as `stale_stages`, of materializations that are at hand."""
    stale: list[tuple[Stage, Reason]] = []
    for stage in STAGES:
        if reason := reason_stale(materializations, stage, workspace, recipe, external):
            stale.append((stage, reason))
        elif above := [parent for parent, _ in stale if parent.key in stage.parents]:
            stale.append((stage, Reason("upstream", f"{above[0].name} may change")))
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
        raise dg.Failure(f"A blocking check of {parent.name} failed; see its checks, fix the cause, materialize it.")
    return store.get(parent.name, str(found.metadata[ARTIFACT].value))


def _is_blocked(materialization: dg.AssetMaterialization) -> bool:
    checks = materialization.metadata.get(CHECKS)
    return checks is not None and checks.value == "failed"


def _failed(check: dg.AssetCheckResult) -> bool:
    return not check.passed and check.severity == dg.AssetCheckSeverity.ERROR


def as_shown(value: Any) -> Any:
    """A number with the digits that a person reads; the artifact has the others."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe(
    stage: Stage,
    artifact: Artifact,
    recipe: Recipe,
    version: str,
    metadata: dict[str, dg.MetadataValue | str | int | float | bool],
    checks: Sequence[dg.AssetCheckResult] = (),
) -> dg.MaterializeResult:
    """What an asset returns: its data version, and the metadata that later stages and `reason_stale` read."""
    # Dagster notes what a parent was when the step began. A stage that looks for itself knows what it has read.
    read = {_INPUT_VERSION_TAG + parent.to_user_string(): version for parent in stage.parents}
    return dg.MaterializeResult(
        asset_key=stage.key,
        data_version=dg.DataVersion(version),
        tags=read if stage.mirrors_parent else None,
        metadata={
            **{name: as_shown(value) for name, value in metadata.items()},
            "recipe name": recipe.name,
            ARTIFACT: artifact.key,
            RECIPE: stage.recipe_hash(recipe),
            CHECKS: "failed" if any(map(_failed, checks)) else "passed",
        },
        check_results=list(checks),
    )
