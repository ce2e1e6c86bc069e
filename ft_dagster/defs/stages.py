"""The stages of the graph in order, and the inputs, code version and recipe parts that each is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import dagster as dg

from ft_dagster.config.recipe import Recipe
from ft_dagster.corpus import index as index_module
from ft_dagster.corpus import sections as sections_module
from ft_dagster.corpus import snapshot as snapshot_module
from ft_dagster.dataset import dataset as dataset_module
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation import request as evaluation_module
from ft_dagster.release import released as release_module
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training import request as training_module

REPORT_FILES = dg.AssetKey("report_files")
BASE_MODEL = dg.AssetKey("base_model")
ARTIFACT = "artifact"
"""Metadata label of each materialization: the key of its artifact in the store."""
RECIPE = "recipe"
"""Metadata label of each materialization: the hash of the recipe parts that its stage reads."""
CHECKS = "blocking checks"
"""Metadata label of each materialization: `passed` or `failed`."""
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
"""The reason of a stage whose inputs have not changed since its blocking check failed. Only a person can fix that."""


@dataclass(frozen=True)
class Stage:
    """One asset of the graph."""

    name: str
    parents: tuple[dg.AssetKey, ...]
    code_version: str
    recipe_parts: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    """Fields of the recipe that the stage reads only if they are switched on, so that they count only then."""
    mirrors_parent: bool = False
    """Whether the stage's data version is computed like its parent's. Such a stage scans the reports again when it
    runs, so its version may be newer than the version of the parent that was recorded before the run."""

    @property
    def key(self) -> dg.AssetKey:
        return dg.AssetKey(self.name)

    def recipe_hash(self, recipe: Recipe) -> str:
        """Return the hash of the recipe parts that this stage reads."""
        on = {name: True for name in self.switches if attrgetter(name)(recipe)}
        return digest(recipe.part(*self.recipe_parts) | on)[:16]


RAW_CHAPTERS = Stage(snapshot_module.KIND, (REPORT_FILES,), index_module.CODE_VERSION, mirrors_parent=True)
SECTIONS = Stage(sections_module.KIND, (RAW_CHAPTERS.key,), sections_module.CODE_VERSION, ("corpus",))
TOKENIZED_DATASET = Stage(
    dataset_module.KIND, (SECTIONS.key, BASE_MODEL), dataset_module.CODE_VERSION, ("tokens", "objectives.taught")
)
LORA_ADAPTER = Stage(
    training_module.KIND,
    (TOKENIZED_DATASET.key, BASE_MODEL),
    training_module.CODE_VERSION,
    ("base", "objectives", "lora", "training"),
)
ADAPTER_EVALUATION = Stage(
    evaluation_module.KIND,
    (LORA_ADAPTER.key, TOKENIZED_DATASET.key),
    evaluation_module.CODE_VERSION,
    ("evaluation", "release"),
)
RELEASED_ADAPTER = Stage(
    "released_adapter", (ADAPTER_EVALUATION.key,), release_module.CODE_VERSION, switches=("release.refit",)
)
NOTHING = "none"
"""Data version of released_adapter while no adapter is released."""
STAGES = (RAW_CHAPTERS, SECTIONS, TOKENIZED_DATASET, LORA_ADAPTER, ADAPTER_EVALUATION, RELEASED_ADAPTER)


def artifact_kind(stage: Stage) -> str:
    """Return the kind of a stage's artifact in the store. A release refers to the evaluation that decided it."""
    return ADAPTER_EVALUATION.name if stage == RELEASED_ADAPTER else stage.name


def latest_materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    """Return the latest materialization of an asset, or None if there is none."""
    event = instance.get_latest_materialization_event(key)
    return event.asset_materialization if event else None


Materializations = Mapping[dg.AssetKey, dg.AssetMaterialization]


def all_materializations(instance: dg.DagsterInstance) -> Materializations:
    """Return the latest materialization of each asset of the graph that has one, in a single query."""
    found = {}
    for record in instance.get_asset_records([REPORT_FILES, BASE_MODEL, *(stage.key for stage in STAGES)]):
        event = record.asset_entry.last_materialization
        if event is not None and event.asset_materialization is not None:
            found[record.asset_entry.asset_key] = event.asset_materialization
    return found


def data_version(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    """Return the data version of an asset's latest materialization, or None if there is none."""
    return version_of(latest_materialization(instance, key))


def last_artifact(materializations: Materializations, store: Store, stage: Stage) -> Artifact | None:
    """Return the artifact of a stage's latest materialization, or None if the store does not have it."""
    last = materializations.get(stage.key)  # a materialization reported by hand has no artifact
    return store.find(stage.name, str(last.metadata[ARTIFACT].value)) if last and ARTIFACT in last.metadata else None


def version_of(found: dg.AssetMaterialization | None) -> str | None:
    """Return the data version of a materialization, or None if there is none."""
    return (found.tags or {}).get(_DATA_VERSION_TAG) if found else None


def input_version(materialization: dg.AssetMaterialization, parent: dg.AssetKey) -> str | None:
    """Return the data version of a parent that a materialization was made from."""
    return (materialization.tags or {}).get(_INPUT_VERSION_TAG + parent.to_user_string())


def reason_stale(
    materializations: Materializations, stage: Stage, workspace: Workspace, recipe: Recipe, external: External
) -> Reason | None:
    """Return why a stage must be made again, or None if it is up to date.

    The stage's recorded inputs are compared with the current ones. Because states are compared, rather than events
    followed, no change is lost and none counts twice. Only the tags and metadata of the latest materializations are
    read, whether the store has the artifact, and which adapter is released.

    Args:
        materializations: the latest one of each asset.
        stage: the stage to check.
        workspace: provides the store and the releases.
        recipe: the recipe of the workspace.
        external: the current data versions of external assets that have not been recorded yet.
    """
    last = materializations.get(stage.key)
    if last is None:
        return Reason("missing", "never materialized")
    tags = last.tags or {}
    if tags.get(_CODE_VERSION_TAG) != stage.code_version:
        return Reason("code", "its code changed")
    made_by = last.metadata.get(RECIPE)
    if made_by is not None and made_by.value not in [stage.recipe_hash(reading) for reading in recipe.readings]:
        parts = (*stage.recipe_parts, *stage.switches)
        return Reason("recipe", f"the recipe changed ({', '.join(parts)})")
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
        measured = workspace.releases.measured()
        if stage == ADAPTER_EVALUATION and measured not in (None, artifact.about["in_use"], artifact.about["adapter"]):
            return Reason("content", "another adapter was released since")
    return BLOCKED if _is_blocked(last) else None


def _is_consumed(materializations: Materializations, evaluation: dg.AssetMaterialization) -> bool:
    """Whether the release has already used an evaluation. A later decision by a person does not make it stale."""
    release = materializations.get(RELEASED_ADAPTER.key)
    return release is not None and input_version(release, ADAPTER_EVALUATION.key) == version_of(evaluation)


def stale_stages(
    instance: dg.DagsterInstance, workspace: Workspace, external: External | None = None
) -> list[tuple[Stage, Reason]]:
    """Return the stages that must be made again, each with its reason. Those below the first may turn out unchanged."""
    return stale_among(all_materializations(instance), workspace, workspace.recipe, external or {})


def stale_among(
    materializations: Materializations, workspace: Workspace, recipe: Recipe, external: External
) -> list[tuple[Stage, Reason]]:
    """Return the same as `stale_stages`, for materializations that have been loaded already."""
    stale: list[tuple[Stage, Reason]] = []
    for stage in STAGES:
        if reason := reason_stale(materializations, stage, workspace, recipe, external):
            stale.append((stage, reason))
        elif above := [parent for parent, _ in stale if parent.key in stage.parents]:
            stale.append((stage, Reason("upstream", f"{above[0].name} may change")))
    return stale


def cause_of(instance: dg.DagsterInstance, recipe: Recipe) -> str:
    """Return the hash of all that determines what a run makes: the external contents, the recipe and the code."""
    contents = [data_version(instance, key) for key in (REPORT_FILES, BASE_MODEL)]
    stages = [[stage.name, stage.code_version, stage.recipe_hash(recipe)] for stage in STAGES]
    return digest([contents, stages])[:32]


def input_artifact(context: dg.AssetExecutionContext, parent: Stage, store: Store) -> Artifact:
    """Return the artifact of a parent's latest materialization, after verifying its bytes.

    Raises:
        Failure: the parent has not been materialized, or one of its blocking checks failed.
        StoreError: the artifact is missing from the store, or damaged.
    """
    found = latest_materialization(context.instance, parent.key)
    if found is None or ARTIFACT not in found.metadata:
        raise dg.Failure(f"{parent.name} has not been materialized. Materialize it first, or run `ft-dagster run`.")
    if _is_blocked(found):
        raise dg.Failure(f"A blocking check of {parent.name} failed. See its checks, fix the cause and materialize it.")
    return store.get(parent.name, str(found.metadata[ARTIFACT].value))


def _is_blocked(materialization: dg.AssetMaterialization) -> bool:
    checks = materialization.metadata.get(CHECKS)
    return checks is not None and checks.value == "failed"


def _failed(check: dg.AssetCheckResult) -> bool:
    return not check.passed and check.severity == dg.AssetCheckSeverity.ERROR


def as_shown(value: Any) -> Any:
    """Round a float to six significant digits for display. The artifact keeps the full precision."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe(
    stage: Stage,
    artifact: Artifact,
    recipe: Recipe,
    version: str,
    metadata: dict[str, dg.MetadataValue | str | int | float | bool],
    checks: Sequence[dg.AssetCheckResult] = (),
) -> dg.MaterializeResult:
    """Return the result of an asset: its data version, and the metadata that later stages and `reason_stale` read."""
    # Dagster records the parent's version at the start of the step. A stage that scans the reports itself records the
    # version that it read.
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
