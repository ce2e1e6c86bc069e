"""The asset released_adapter."""

import dagster as dg

from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    LORA_ADAPTER,
    NOTHING,
    RELEASED_ADAPTER,
    describe,
    input_artifact,
)
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace


@dg.asset(
    deps=RELEASED_ADAPTER.parents,
    code_version=RELEASED_ADAPTER.code_version,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"huggingface"},
)
def released_adapter(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """`./fine_tuned_model/`: the adapter in use. Replaced in one step when the verdict says so, else kept as it is."""
    store, releases = workspace.store, workspace.releases
    evaluation = input_artifact(context, ADAPTER_EVALUATION, store)
    verdict = evaluation.about["verdict"]
    current = releases.current()
    if current not in (None, evaluation.about["in_use"], evaluation.about["adapter"]):
        raise dg.Failure("Another adapter was released since the evaluation. Materialize adapter_evaluation again.")
    if verdict["decision"] == "release":
        moved = releases.release(store.get(LORA_ADAPTER.name, evaluation.about["adapter"]), verdict)
        if moved:
            context.log.warning(f"{releases.link} was not a release of ours; it is kept as {moved}")
    current = releases.current()
    return describe(
        RELEASED_ADAPTER,
        evaluation,
        workspace.recipe,
        current or NOTHING,
        {
            "decision": verdict["decision"],
            "reason": verdict["reason"],
            "adapter": current or NOTHING,
            "folder": dg.MetadataValue.path(releases.link),
            "bits per byte": evaluation.about["models"]["new"]["bits_per_byte"],
            "releases so far": len(releases.history()),
        },
    )
