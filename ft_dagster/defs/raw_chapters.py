"""The asset raw_chapters."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from ft_dagster.corpus.files import SourceFile, Unreadable, require_reports
from ft_dagster.corpus.index import Scan, changed_since
from ft_dagster.defs.external import look
from ft_dagster.defs.pictures import table
from ft_dagster.defs.runs import CAUSE_TAG
from ft_dagster.defs.stages import RAW_CHAPTERS, describe
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
from ft_dagster.settings import Settings
from ft_dagster.store import Artifact, Store

FILES = "files.json"


@dg.asset(
    deps=RAW_CHAPTERS.parents,
    code_version=RAW_CHAPTERS.code_version,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"markdown", "json"},
)
def raw_chapters(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """A snapshot of the report files' bytes, so that what was trained on can always be read again."""
    settings, store = workspace.settings, workspace.store
    require_reports(settings.workspace)
    if CAUSE_TAG in context.run.tags:
        _wait_for_writers(settings)
    scan = take_snapshot(settings, store)
    files, version = scan.files, scan.version
    artifact = store.find(RAW_CHAPTERS.name, version) or _write(store, version, scan)
    return describe(
        RAW_CHAPTERS,
        artifact,
        workspace.recipe,
        version,
        {
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "cannot be opened": len(scan.unreadable),
            "list": table([{"file": file.path, "bytes": file.size, "sha256": file.sha256[:12]} for file in files]),
        },
    )


def _wait_for_writers(settings: Settings) -> None:
    """Wait until the reports lie still: since an automatic run was asked for, somebody may have begun to write."""
    while changed_since(look(settings), settings.settle_seconds):
        time.sleep(min(1.0, settings.settle_seconds))


def take_snapshot(settings: Settings, store: Store) -> Scan:
    """Look at the report files and keep the bytes of each; a file that changes meanwhile is looked at again."""
    while True:
        scan = look(settings)
        missing = [file for file in scan.files if not store.has_blob(file.sha256)]
        if all(_keep(settings.workspace / file.path, file.sha256, store) for file in missing):
            return scan


def _keep(path: Path, sha256: str, store: Store) -> bool:
    try:
        return store.put_blob(path.read_bytes()) == sha256
    except OSError:  # gone, or not to be read any more: the next look says which
        return False


def _write(store: Store, version: str, scan: Scan) -> Artifact:
    files = scan.files
    with store.staging() as folder:
        content = {"files": [asdict(file) for file in files], "unreadable": [asdict(item) for item in scan.unreadable]}
        (folder / FILES).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        return store.take_in(RAW_CHAPTERS.name, version, folder, {"files": len(files)})


def read_snapshot(artifact: Artifact) -> tuple[list[SourceFile], list[Unreadable]]:
    """The files of a snapshot; their bytes are blobs of the store."""
    content = json.loads((artifact.path / FILES).read_bytes())
    return [SourceFile(**row) for row in content["files"]], [Unreadable(**row) for row in content["unreadable"]]
