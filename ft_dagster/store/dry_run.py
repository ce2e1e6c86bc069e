"""Trying what would come out, without a trace in the store."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ft_dagster.store.local import Artifact, Store


class DryRunStore(Store):
    """A store that reads from another one and writes to a folder of its own: for trying what would come out."""

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

    def bring_blobs(self, names: Iterable[str]) -> None:
        self.below.bring_blobs(name for name in names if not super(DryRunStore, self).has_blob(name))

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        below = self.root not in artifact.path.parents
        return self.below.read_file(artifact, name) if below else super().read_file(artifact, name)

    def bring(self, artifact: Artifact) -> None:
        if self.root not in artifact.path.parents:
            self.below.bring(artifact)

    def find(self, kind: str, key: str) -> Artifact | None:
        return super().find(kind, key) or self._lift(self.below.find(kind, key))

    def newest(self, kind: str, **about: Any) -> Artifact | None:
        return super().newest(kind, **about) or self._lift(self.below.newest(kind, **about))

    def _lift(self, found: Artifact | None) -> Artifact | None:
        """What is made from it goes to this store, not to the one below."""
        return replace(found, store=self) if found else None
