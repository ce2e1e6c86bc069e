"""A store in a bucket that many machines share, with a local copy of what this machine has read or made.

In the bucket every file is a blob, named by its hash. An artifact is only its manifest, which names its blobs and is
written last, in one step. A process that reads the manifest therefore finds all of the files, and if two processes
write it at the same time, one of them wins completely. The local folder has the layout of a local store, so that a
process that gets the path of an artifact does not need the bucket.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ft_dagster.config.settings import Settings
from ft_dagster.store import formats
from ft_dagster.store.bucket import Bucket, Entry, endpoint_url
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import MANIFEST, Artifact, Store, StoreError, manifest_text, write_atomically

_BATCH_BYTES, _BATCH_BLOBS = 64 * 2**20, 1024


def open_store(settings: Settings) -> Store:
    """Return the store that FT_STORE names.

    Raises:
        StoreError: a newer version wrote the store, if it is a folder. For a bucket, `in_use` checks it.
    """
    if (url := settings.store_url) is None:
        formats.require_known(settings.store_root, formats.STORE)
        return Store(settings.store_root)
    return SharedStore(url, settings.cache / "stores" / digest([url, endpoint_url()])[:16])


class SharedStore(Store):
    """A store in a bucket. Only the bucket's content counts; the local folder avoids downloading it again."""

    url: str

    def __init__(self, url: str, root: Path) -> None:
        super().__init__(root)
        self.bucket = Bucket(url)
        self.url = self.bucket.url

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """As `Store.in_use`. Raises StoreError if a newer version wrote the store at the URL."""
        known = f"{formats.STORE}\n".encode()
        there = self.bucket.read(formats.NAME) or self.bucket.write_first(formats.NAME, known)
        formats.read_number(there, f"{self}/{formats.NAME}", formats.STORE)
        with super().in_use():
            yield

    # Blobs

    def put_blobs(self, contents: Iterable[bytes]) -> list[str]:
        names: list[str] = []
        for batch in _batches(contents):
            data = {digest(content): content for content in batch}
            here = [name for name in data if super(SharedStore, self).has_blob(name)]
            there = self.bucket.entries(map(_blob, here))  # a blob without a local copy is rarely in the bucket
            known = {blob for blob, entry in there.items() if entry}
            self.bucket.write_many({_blob(name): data[name] for name in data if _blob(name) not in known})
            names += super().put_blobs(batch)
        return names

    def blobs(self) -> set[str]:
        return {name.rpartition("/")[2] for name in self.bucket.list("blobs")}

    @cached_property
    def _listed(self) -> set[str]:
        return self.blobs()

    def has_blob(self, name: str) -> bool:
        return super().has_blob(name) or name in self._listed

    def get_blob(self, name: str) -> bytes:
        try:
            return super().get_blob(name)
        except StoreError:  # the local copy is missing or damaged
            self._fetch_blobs([name])
        return super().get_blob(name)

    def fetch_blobs(self, names: Iterable[str]) -> None:
        missing = [name for name in dict.fromkeys(names) if not super(SharedStore, self).has_blob(name)]
        for first in range(0, len(missing), _BATCH_BLOBS):
            self._fetch_blobs(missing[first : first + _BATCH_BLOBS])

    def _fetch_blobs(self, names: Iterable[str]) -> None:
        with self.staging() as folder:
            hashes = {_blob(name): name for name in names}
            repair = self._repair_blob("it and ")
            self.bucket.fetch({folder / name: blob for blob, name in hashes.items()}, hashes, repair)
            for name in hashes.values():
                path = self.blob_path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(path)

    # Artifacts

    def find(self, kind: str, key: str) -> Artifact | None:
        content = self.bucket.read(f"{kind}/{key}/{MANIFEST}")
        return None if content is None else self._read_manifest(kind, key, content)

    def all(self, kind: str) -> Iterator[Artifact]:
        """Yield the artifacts of this kind, newest first.

        A bucket's clock has a resolution of one second; artifacts of the same second come in the order of their keys.
        """
        known = {
            name: self.root / "manifests" / kind / f"{name.split('/')[1]}.{digest(entry.version)[:16]}.json"
            for name, entry in self._manifests(kind).items()
        }
        for name, content in self.bucket.read_many(n for n, path in known.items() if not path.exists()).items():
            write_atomically(known[name], content)
        for name, path in known.items():
            if path.exists():  # otherwise it was removed after it was listed
                yield self._read_manifest(kind, name.split("/")[1], path.read_bytes())

    def keys(self, kind: str) -> list[str]:
        return [name.split("/")[1] for name in self._manifests(kind)]

    def _manifests(self, kind: str) -> dict[str, Entry]:
        found = {name: entry for name, entry in self.bucket.list(kind).items() if name.endswith(f"/{MANIFEST}")}
        return dict(sorted(found.items(), key=lambda item: (-item[1].at, item[0])))

    def committed_at(self, artifact: Artifact) -> float:
        name = f"{artifact.kind}/{artifact.key}/{MANIFEST}"
        entry = self.bucket.entries([name])[name]
        return entry.at if entry else 0.0

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        path = artifact.path / name
        expected = artifact.files.get(name, "")
        if path.is_file() and digest(data := path.read_bytes()) == expected:
            return data
        return self.get_blob(expected)

    def fetch(self, artifact: Artifact) -> None:
        if self._is_here(artifact):
            return
        with self.staging() as folder:
            for name in artifact.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.bucket.fetch(
                {folder / name: _blob(sha256) for name, sha256 in artifact.files.items()},
                {_blob(sha256): sha256 for sha256 in artifact.files.values()},
                f"Delete it and {self}/{artifact.kind}/{artifact.key}/{MANIFEST}, and run `ft-dagster run`, which "
                "makes them again.",
            )
            text = manifest_text(artifact.kind, artifact.key, artifact.about, artifact.files)
            write_atomically(folder / MANIFEST, text)
            self._move_in(replace(artifact, path=folder))

    def _publish(self, sealed: Artifact) -> Artifact | None:
        self.bucket.put({_blob(sha256): sealed.path / name for name, sha256 in sealed.files.items()})
        name = f"{sealed.kind}/{sealed.key}/{MANIFEST}"
        there = self.bucket.write_first(name, (sealed.path / MANIFEST).read_bytes())
        artifact = self._read_manifest(sealed.kind, sealed.key, there)
        if _same(artifact, sealed):
            return None
        shutil.rmtree(sealed.path)  # another machine finished the same work first
        return artifact

    def _use_existing(self, sealed: Artifact, target: Path) -> Artifact:
        """Return the copy at `target` if it is the same artifact; otherwise replace it with this one."""
        if self._is_here(sealed):
            shutil.rmtree(sealed.path)
            return replace(sealed, path=target)
        with self.staging() as aside, suppress(FileNotFoundError):
            target.rename(aside / "old")
        return self._move_in(sealed)

    def _is_here(self, artifact: Artifact) -> bool:
        try:
            copy = Store(self.root).find(artifact.kind, artifact.key)
        except StoreError:
            return False
        return copy is not None and _same(copy, artifact)


def _blob(name: str) -> str:
    return f"blobs/{name[:2]}/{name}"


def _same(one: Artifact, other: Artifact) -> bool:
    return (one.about, one.files) == (other.about, other.files)


def _batches(contents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Split blobs into batches that are limited in bytes and in number, to limit memory and connections."""
    batch: list[bytes] = []
    size = 0
    for content in contents:
        batch.append(content)
        size += len(content)
        if size > _BATCH_BYTES or len(batch) >= _BATCH_BLOBS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
