"""Snapshots of the report files: their bytes at one moment, stored so that training data can always be read again."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ft_dagster.corpus.files import CorpusError, SourceFile, Unreadable
from ft_dagster.corpus.index import CODE_VERSION, Scan, changed_since, scan_reports
from ft_dagster.corpus.shards import group_names
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact, Store

KIND = "raw_chapters"
"""The name of this kind of artifact in the store."""
_SHARDS = "shards.json"


@dataclass(frozen=True)
class SnapshotShard:
    """The files of a group of chapters in a snapshot."""

    group: str
    blob: str
    """SHA-256 of the list of files. Groups with the same list have the same bytes."""


def take_snapshot(workspace: Path, index_path: Path, store: Store, settle_seconds: float = 0.0) -> Artifact:
    """Scan the report files and store the bytes of each; if a file changes meanwhile, scan again.

    Args:
        workspace: the folder of the workspace.
        index_path: the index of the files that were hashed before.
        store: the store for the bytes and for the list of files.
        settle_seconds: how long the files must have been unchanged before they are read; until then, somebody may
            still be writing.

    Raises:
        CorpusError: the files keep changing for much longer than that.
    """
    doubted: set[str] = set()
    until = time.monotonic() + 60 + 10 * settle_seconds
    while True:
        if time.monotonic() > until:
            raise CorpusError("The reports keep changing. Stop the program that keeps writing to them.")
        scan = scan_reports(workspace, index_path, doubted=doubted)
        if changed_since(scan, settle_seconds):
            time.sleep(min(1.0, settle_seconds))
            continue
        if keep_contents(workspace, scan, store):
            return write_snapshot(scan, store)
        # The index may be wrong about files whose bytes are not in the store.
        doubted = {file.path for file in scan.files if not store.has_blob(file.sha256)}


def keep_contents(workspace: Path, scan: Scan, store: Store) -> bool:
    """Store the bytes of every file. Return False if a file is no longer the one that the scan found."""
    kept = store.blobs()
    missing = {file.sha256: file for file in scan.files if file.sha256 not in kept}
    return missing.keys() <= set(store.put_blobs(_contents(workspace, missing.values())))


def _contents(workspace: Path, files: Iterable[SourceFile]) -> Iterator[bytes]:
    for file in files:
        try:
            yield (workspace / file.path).read_bytes()
        except OSError:  # deleted, or no longer readable: the next scan finds out which
            continue


def write_snapshot(scan: Scan, store: Store) -> Artifact:
    """Store the list of files that a scan found, whose bytes have been stored before."""
    version = scan.version
    key = digest([CODE_VERSION, version])
    if found := store.find(KIND, key):
        return found
    chapters: dict[str, list[SourceFile]] = {}
    for file in scan.files:
        chapters.setdefault(file.chapter, []).append(file)
    groups = group_names(chapters)
    blobs = store.put_blobs(
        canonical_json([tuple(file) for name in names for file in sorted(chapters[name])]) for names in groups.values()
    )
    with store.staging() as folder:
        content = {
            "shards": [asdict(SnapshotShard(*shard)) for shard in zip(groups, blobs, strict=True)],
            "unreadable": [asdict(item) for item in scan.unreadable],
        }
        (folder / _SHARDS).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        about = {
            "version": version,
            "files": len(scan.files),
            "bytes": sum(file.size for file in scan.files) + sum(item.size for item in scan.unreadable),
        }
        return store.commit(KIND, key, folder, about)


def is_snapshot(artifact: Artifact) -> bool:
    """Whether an artifact is a snapshot in the format that this version writes."""
    return _SHARDS in artifact.files


def snapshot_shards(snapshot: Artifact) -> list[SnapshotShard]:
    """Return the groups of a snapshot."""
    return [SnapshotShard(**shard) for shard in snapshot.read_json(_SHARDS)["shards"]]


def unreadable_files(snapshot: Artifact) -> list[Unreadable]:
    """Return the files that could not be read when the snapshot was taken."""
    return [Unreadable(**item) for item in snapshot.read_json(_SHARDS)["unreadable"]]


def shard_files(store: Store, shard: SnapshotShard) -> list[SourceFile]:
    """Return the files of one group."""
    return [SourceFile(*row) for row in json.loads(store.get_blob(shard.blob))]


def snapshot_files(snapshot: Artifact) -> Iterator[SourceFile]:
    """Yield all files of a snapshot, group by group; their bytes are blobs of the store."""
    shards = snapshot_shards(snapshot)
    snapshot.store.fetch_blobs(shard.blob for shard in shards)
    for shard in shards:
        yield from shard_files(snapshot.store, shard)
