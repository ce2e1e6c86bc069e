"""The asset raw_chapters."""

import dagster as dg

from ft_dagster.corpus.files import require_reports
from ft_dagster.corpus.snapshot import snapshot_files, take_snapshot, unreadable_files
from ft_dagster.defs.assets.external import record_versions
from ft_dagster.defs.assets.pictures import table
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.runs.state import CAUSE_TAG
from ft_dagster.defs.stages import RAW_CHAPTERS, describe
from ft_dagster.defs.workspace import Workspace


@stage_asset(
    RAW_CHAPTERS,
    kinds={"markdown", "json"},
)
def raw_chapters(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """A snapshot of the report files' bytes, so that the training text can always be read again."""
    settings = workspace.settings
    # Since an automatic run was requested, somebody may have started to write; a person who starts a run knows that.
    settle_seconds = settings.settle_seconds if CAUSE_TAG in context.run.tags else 0.0
    artifact = take_snapshot(settings.workspace, settings.index, workspace.store, settle_seconds)
    unreadable = unreadable_files(artifact)
    files = artifact.about["files"]
    require_reports(settings.workspace, files + len(unreadable))
    # If a person started the run, the sensor may not have recorded the version that it reads.
    record_versions(context.instance, artifact.about["version"], workspace.recipe)
    rows = ({"file": file.path, "bytes": file.size, "sha256": file.sha256[:12]} for file in snapshot_files(artifact))
    return describe(
        RAW_CHAPTERS,
        artifact,
        workspace.recipe,
        artifact.about["version"],
        {
            "files": files,
            "bytes": artifact.about["bytes"],
            "cannot be opened": len(unreadable),
            "list": table(rows, files),
        },
    )
