"""The asset released_adapter."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from ft_dagster.defs.assets.pictures import table
from ft_dagster.defs.assets.refit import refit_of
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.releasing import PROMOTED, override
from ft_dagster.defs.runs.child_process import ChildProcess
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    LORA_ADAPTER,
    NOTHING,
    RELEASED_ADAPTER,
    TOKENIZED_DATASET,
    all_materializations,
    describe,
    input_artifact,
    last_artifact,
)
from ft_dagster.defs.workspace import Workspace
from ft_dagster.errors import UserError
from ft_dagster.evaluation.gate import WITHDRAWN
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.lineage import never_trained_on, release_history
from ft_dagster.release.released import Releases
from ft_dagster.release.tracking import TrackingError, track
from ft_dagster.store.local import Artifact

_MOST_NAMES = 100


class Override(dg.Config):
    """What a person can decide in the launchpad."""

    promote: str = Field(
        default="", description="Key, or the beginning of it, of an adapter to release whatever the gate decided."
    )
    why: str = Field(default="", description="The reason, which is kept in the release history.")


def released_adapter_asset(pool: str | None) -> dg.AssetsDefinition:
    """Return the asset. Its step needs a slot of the pool only if the recipe refits, which trains."""

    @stage_asset(RELEASED_ADAPTER, kinds={"huggingface"}, pool=pool)
    def released_adapter(
        context: dg.AssetExecutionContext, config: Override, workspace: Workspace, child_process: ChildProcess
    ) -> Iterator[dg.AssetObservation | dg.MaterializeResult]:
        """The adapter in use, `./fine_tuned_model/`. It is replaced in one step if the verdict says so, or kept."""
        evaluation = input_artifact(context, ADAPTER_EVALUATION, workspace.store)
        wanted, why = _decision(config, evaluation, workspace)
        if wanted and workspace.recipe.release.refit and "by" not in why:
            refit, result = yield from refit_of(context, workspace, child_process, wanted)
            wanted = refit or wanted
            why = why | {"reason": f"{why['reason']}; {result}"}
        yield _release(context, workspace, evaluation, wanted, why)

    return released_adapter


def _release(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    evaluation: Artifact,
    wanted: Artifact | None,
    why: Mapping[str, Any],
) -> dg.MaterializeResult:
    """Release the wanted adapter, if there is one, and describe the adapter in use."""
    store, releases = workspace.store, workspace.releases
    if wanted:
        moved = releases.release(wanted, why)
        if moved:
            context.log.warning(f"{releases.link} was not a release of ft_dagster; it was moved to {moved}")
    try:
        track(workspace.settings, store, releases)
    except TrackingError as error:  # the release does not depend on it
        context.log.warning(str(error))
    current = releases.current()
    return describe(
        RELEASED_ADAPTER,
        evaluation,
        workspace.recipe,
        current or NOTHING,
        {
            "decision": why["decision"],
            "reason": why["reason"],
            "adapter": current or NOTHING,
            "folder": dg.MetadataValue.path(releases.link),
            "bits per byte": evaluation.about["models"]["new"]["bits_per_byte"],
            **({"measured as": str(releases.measured())} if releases.measured() != current else {}),
            **_never_learned(releases, context, workspace),
            "releases so far": len(releases.history()),
            "history": table(reversed(release_history(releases, store))),
        },
    )


def _never_learned(releases: Releases, context: dg.AssetExecutionContext, workspace: Workspace) -> dict[str, str]:
    """Return the chapters and sections that the adapter in use has never seen, and how it would learn them."""
    folder = releases.current_folder()
    dataset = last_artifact(all_materializations(context.instance), workspace.store, TOKENIZED_DATASET)
    units = never_trained_on(read_manifest(folder), dataset) if folder and dataset else []
    if not units:
        return {}
    names = ", ".join(units[:_MOST_NAMES]) + (f" and {len(units) - _MOST_NAMES} more" * (len(units) > _MOST_NAMES))
    how = " (`release: {refit: true}` in the recipe trains on them after the gate)"
    return {"never trained on": names + how * (not workspace.recipe.release.refit)}


def _decision(config: Override, evaluation: Artifact, workspace: Workspace) -> tuple[Artifact | None, dict[str, Any]]:
    """Return the adapter to release, if any, and why."""
    store, verdict = workspace.store, evaluation.about["verdict"]
    if config.promote:
        try:
            return store.match(LORA_ADAPTER.name, config.promote), override(config.why, PROMOTED)
        except UserError as error:
            raise dg.Failure(str(error)) from error
    if evaluation.about["adapter"] in workspace.releases.withdrawn():  # perhaps after its evaluation
        return None, WITHDRAWN.to_json()
    current = workspace.releases.measured()
    if current not in (None, evaluation.about["in_use"], evaluation.about["adapter"]):
        if workspace.releases.chosen_by_hand():
            return None, {"decision": "keep", "reason": f"a person put {current} in use, and nothing has changed since"}
        raise dg.Failure("Another adapter was released since the evaluation. Materialize adapter_evaluation again.")
    released = verdict["decision"] == "release"
    return (store.get(LORA_ADAPTER.name, evaluation.about["adapter"]) if released else None), verdict
