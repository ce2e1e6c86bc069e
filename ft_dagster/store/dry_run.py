"""A store for dry runs, which leave no trace in the workspace's store."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ft_dagster.store.local import Artifact, Store


class DryRunStore(Store):
    """A store that reads from another store and writes only to a folder of its own, for dry runs."""

    def __init__(self, below: Store, root: Path) -> None:
        super().__init__(root)
        self.below = below

    def blobs(self) -> set[str]:
        return super().blobs() | self.below.blobs()

    def blob_path(self, name: str) -> Path:
        path = self.below.blob_path(name)
        return path if path.exists() else super().blob_path(name)

    def has_blob(self, name: str) -> bool:
        return super().has_blob(name) or self.below.has_blob(name)

    def get_blob(self, name: str) -> bytes:
        return super().get_blob(name) if super().has_blob(name) else self.below.get_blob(name)

    def fetch_blobs(self, names: Iterable[str]) -> None:
        self.below.fetch_blobs(name for name in names if not super(DryRunStore, self).has_blob(name))

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        below = self.root not in artifact.path.parents
        return self.below.read_file(artifact, name) if below else super().read_file(artifact, name)

    def fetch(self, artifact: Artifact) -> None:
        if self.root not in artifact.path.parents:
            self.below.fetch(artifact)

    def find(self, kind: str, key: str) -> Artifact | None:
        return super().find(kind, key) or self._as_own(self.below.find(kind, key))

    def newest(self, kind: str, **about: Any) -> Artifact | None:
        return super().newest(kind, **about) or self._as_own(self.below.newest(kind, **about))

    def _as_own(self, found: Artifact | None) -> Artifact | None:
        """Return an artifact of the store below as one of this store, so that what is made from it is written here."""
        return replace(found, store=self) if found else None
