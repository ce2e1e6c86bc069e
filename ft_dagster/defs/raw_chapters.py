"""The asset raw_chapters."""

import json
from dataclasses import asdict

import dagster as dg

from ft_dagster.corpus.files import SourceFile, Unreadable, content_version, read_reports, require_reports
from ft_dagster.defs.pictures import table
from ft_dagster.defs.stages import RAW_CHAPTERS, describe
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
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
    require_reports(workspace.settings.workspace)
    store = workspace.store
    files: list[SourceFile] = []
    unreadable: list[Unreadable] = []
    for found in read_reports(workspace.settings.workspace):
        if isinstance(found, Unreadable):
            unreadable.append(found)
        else:
            files.append(found[0])
            store.put_blob(found[1])
    version = content_version(files, unreadable)
    artifact = store.find(RAW_CHAPTERS.name, version) or _write(store, version, files, unreadable)
    return describe(
        RAW_CHAPTERS,
        artifact,
        workspace.recipe,
        version,
        {
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "cannot be opened": len(unreadable),
            "list": table([{"file": file.path, "bytes": file.size, "sha256": file.sha256[:12]} for file in files]),
        },
    )


def _write(store: Store, version: str, files: list[SourceFile], unreadable: list[Unreadable]) -> Artifact:
    with store.staging() as folder:
        content = {"files": [asdict(file) for file in files], "unreadable": [asdict(item) for item in unreadable]}
        (folder / FILES).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        return store.take_in(RAW_CHAPTERS.name, version, folder, {"files": len(files)})


def read_snapshot(artifact: Artifact) -> tuple[list[SourceFile], list[Unreadable]]:
    """The files of a snapshot; their bytes are blobs of the store."""
    content = json.loads((artifact.path / FILES).read_bytes())
    return [SourceFile(**row) for row in content["files"]], [Unreadable(**row) for row in content["unreadable"]]
