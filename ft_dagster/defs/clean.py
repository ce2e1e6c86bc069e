"""Finding and removing what is not needed: artifacts from which no kept adapter was made, and old runs."""

import json
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.corpus.sections import stored_shards
from ft_dagster.corpus.snapshot import is_snapshot, shard_files, snapshot_shards
from ft_dagster.dataset.dataset import dataset_shards
from ft_dagster.defs.runs.history import forget_runs, old_runs, run_files
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    ARTIFACT,
    LORA_ADAPTER,
    RAW_CHAPTERS,
    SECTIONS,
    STAGES,
    TOKENIZED_DATASET,
    all_materializations,
    artifact_kind,
)
from ft_dagster.defs.workspace import Workspace
from ft_dagster.model.manifest import MANIFEST
from ft_dagster.store.local import Artifact, Store, StoreError
from ft_dagster.training.request import RESULT

_ATTEMPT_SECONDS = 86_400
"""An unfinished training that has not changed for this long is considered abandoned."""
KINDS = (RAW_CHAPTERS, SECTIONS, TOKENIZED_DATASET, LORA_ADAPTER, ADAPTER_EVALUATION)


@dataclass
class Removable:
    """Files and folders that nothing kept refers to, and runs that are not needed."""

    paths: dict[str, list[Path]] = field(default_factory=dict)
    """What the files or folders are -> their paths."""
    kept_adapters: list[str] = field(default_factory=list)
    runs: dict[str, list[Path]] = field(default_factory=dict)
    """Id of an old run in Dagster's history -> the files that contain its events, if the history is kept in files."""

    def __bool__(self) -> bool:
        return bool(self.paths or self.runs)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return what the items are -> their number and bytes. The bytes of a history on a server are unknown (0)."""
        sizes = {name: (len(paths), sum(map(_size, paths))) for name, paths in self.paths.items()}
        if self.runs:
            sizes["old runs"] = (len(self.runs), sum(_size(file) for files in self.runs.values() for file in files))
        return sizes

    def to_json(self) -> dict[str, Any]:
        rows = {name: {"count": count, "bytes": size} for name, (count, size) in self.sizes().items()}
        return {"removable": rows, "kept_adapters": self.kept_adapters}

    def remove(self, instance: dg.DagsterInstance) -> None:
        """Remove everything that was found.

        What refers to other items goes first, and each item goes in one step, so that an interruption leaves nothing
        incomplete.
        """
        forget_runs(instance, self.runs)
        for paths in self.paths.values():
            for path in paths:
                if path.is_dir() and not path.is_symlink():
                    aside = path.with_name(f".removed-{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)  # left by an interrupted removal
                    path.rename(aside)
                    shutil.rmtree(aside)
                else:
                    path.unlink(missing_ok=True)


def find_removable(instance: dg.DagsterInstance, workspace: Workspace) -> Removable:
    """Return what no kept adapter and no current asset needs.

    Kept are the adapters that were made last (FT_KEEP_ADAPTERS), those ever released (FT_KEEP_RELEASED), the released
    one and the current one, with the chapters, sections, dataset and evaluations of each, and the current artifacts of
    all assets. All runs are kept unless FT_KEEP_RUNS limits their number.

    Raises:
        StoreError: a kept artifact is damaged, so that what it refers to is unknown; or the store is a bucket.
    """
    store, settings = workspace.store, workspace.settings
    if store.url:
        raise StoreError(
            f"{store} is not cleaned: other machines and workspaces may use what is in it, and their history is not "
            "here. To start over, name another prefix in FT_STORE, and remove the old one with the tools of your "
            "object store once nothing uses it."
        )
    keep = _Kept(store)
    materializations = all_materializations(instance)
    for stage in STAGES:
        if (last := materializations.get(stage.key)) and ARTIFACT in last.metadata:
            keep.add(artifact_kind(stage), str(last.metadata[ARTIFACT].value))
    released = workspace.releases.current()
    wanted = set(store.keys(LORA_ADAPTER.name)[: settings.keep_adapters]) | ({released} if released else set())
    if settings.keep_released:
        wanted |= {entry["adapter"] for entry in workspace.releases.history()}
    wanted |= {e["measured"] for e in workspace.releases.history() if "measured" in e and e["adapter"] in wanted}
    for key in wanted:
        keep.add(LORA_ADAPTER.name, key)
    kept_adapters = sorted(keep.artifacts[LORA_ADAPTER.name])
    for evaluation in store.all(ADAPTER_EVALUATION.name):
        if evaluation.about["adapter"] in kept_adapters:
            keep.add(ADAPTER_EVALUATION.name, evaluation.key)
    tokens = TOKENIZED_DATASET.name
    removable = Removable(kept_adapters=kept_adapters)
    for stage in reversed(KINDS):
        gone = sorted(set(store.keys(stage.name)) - keep.artifacts[stage.name])
        removable.paths[stage.name] = [store.root / stage.name / key for key in gone]
    removable.paths["copies of released adapters"] = [
        path for path in _children(workspace.releases.folder) if path.is_dir() and path.name not in wanted
    ]
    removable.paths["files of chapters, sections and datasets"] = [
        store.blob_path(name) for name in sorted(store.blobs() - keep.blobs)
    ]
    removable.paths["trainings given up"] = [
        path for path in _children(settings.state / "attempts") if _is_given_up(path, keep.artifacts[tokens])
    ]
    state = [*(settings.state / "released").glob(".removed-*"), *(settings.state / "attempts").glob(".removed-*")]
    unfinished = [
        *state,
        *_children(store.root / "staging"),
        *store.root.glob("*/.removed-*"),
        *store.root.glob("blobs/*/.*"),
    ]
    removable.paths["unfinished artifacts"] = unfinished
    removable.paths = {name: paths for name, paths in removable.paths.items() if paths}
    if settings.keep_runs is not None:
        removable.runs = {run: run_files(instance, run) for run in old_runs(instance, settings.keep_runs)}
    return removable


class _Kept:
    """The kept artifacts, with everything that they were made from."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.artifacts: dict[str, set[str]] = {stage.name: set() for stage in KINDS}
        self.blobs: set[str] = set()

    def add(self, kind: str, key: str) -> None:
        artifact = self.store.find(kind, key)
        if key in self.artifacts[kind] or artifact is None:
            return
        self.artifacts[kind].add(key)
        self.blobs.update(_blobs(artifact))
        for parent, parent_key in _made_from(artifact).items():
            self.add(parent, parent_key)


def _made_from(artifact: Artifact) -> dict[str, str]:
    if artifact.kind == SECTIONS.name:
        return {RAW_CHAPTERS.name: artifact.about[RAW_CHAPTERS.name]}
    if artifact.kind == TOKENIZED_DATASET.name:
        return dict(artifact.about["made_from"])
    if artifact.kind == LORA_ADAPTER.name:
        manifest = artifact.read_json(MANIFEST)
        measured = manifest.get("refit_of")  # manifests of earlier versions lack it
        return manifest["made_from"] | ({LORA_ADAPTER.name: measured} if measured else {})
    if artifact.kind == ADAPTER_EVALUATION.name:
        return {LORA_ADAPTER.name: artifact.about["adapter"]}
    return {}


def _blobs(artifact: Artifact) -> Iterator[str]:
    if artifact.kind == RAW_CHAPTERS.name and not is_snapshot(artifact):  # written by an earlier version
        yield from (row["sha256"] for row in artifact.read_json("files.json")["files"])
    elif artifact.kind == RAW_CHAPTERS.name:
        for shard in snapshot_shards(artifact):
            yield shard.blob
            yield from (file.sha256 for file in shard_files(artifact.store, shard))
    elif artifact.kind == SECTIONS.name and "made_by" in artifact.about:
        for sections in stored_shards(artifact):
            yield from (sections.lines, sections.figures)
    elif artifact.kind == TOKENIZED_DATASET.name and "made_by" in artifact.about:
        for rows in dataset_shards(artifact):
            yield from rows.blobs


def _is_given_up(attempts: Path, datasets: set[str]) -> bool:
    """Whether a training is unfinished, has not changed for long, and does not use a kept dataset."""
    if any(attempts.glob(f"*/{RESULT}")) or time.time() - _newest_change(attempts) < _ATTEMPT_SECONDS:
        return False
    try:
        requests = [json.loads(path.read_bytes()) for path in attempts.glob("*/request.json")]
        return not any(Path(request["dataset"]).name in datasets for request in requests)
    except (OSError, ValueError, KeyError):
        return True


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _newest_change(folder: Path) -> float:
    return max([folder.stat().st_mtime, *(path.stat().st_mtime for path in folder.rglob("*"))])


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(_bytes(file) for file in files)


def _bytes(file: Path) -> int:
    try:
        status = file.lstat()
    except FileNotFoundError:  # a run has just moved it into place
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
