"""Content-addressed artifacts: what each stage made, kept whole and checked when read.

Two kinds of things live in a store:

* **blobs**: the bytes of one file, named by their SHA-256 (chapter texts);
* **artifacts**: a folder that one stage made, named by (kind, key). It is taken in with one rename, after
  its `artifact.json` has been written with the hash of every file, so that a reader sees it whole or not at all.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "artifact.json"


class StoreError(Exception):
    """Something in the store is missing or is not what its name says."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8.

    >>> canonical_json({"b": 1, "a": "é"})
    b'{"a":"\\xc3\\xa9","b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of bytes as they are or of any other value's canonical JSON."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # not mkstemp, whose files others may not read
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Artifact:
    """A folder in the store that one stage made, with the manifest that was written last."""

    kind: str
    key: str
    path: Path
    about: Mapping[str, Any]
    """What the stage says of it: plain JSON."""
    files: Mapping[str, str]
    """Relative path -> SHA-256 of every file in the folder, the manifest excepted."""

    def verify(self) -> None:
        """Raise StoreError, naming the file, if a byte of the folder is not what was taken in."""
        for name, expected in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise StoreError(f"{path} is missing from the store. {_REPAIR.format(self.path)}")
            if file_digest(path) != expected:
                raise StoreError(f"{path} is damaged: its hash is not the one recorded. {_REPAIR.format(self.path)}")


_REPAIR = "Delete {} and run `ft-dagster run`: it is made again from what it was made of."


def _manifest(kind: str, key: str, about: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """What artifact.json holds. Its own hash is in it: the other files' hashes are only worth what it is."""
    content = {"kind": kind, "key": key, "about": about, "files": files}
    return content | {"hash": digest(content)}


class Store:
    """A store in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # Blobs

    def put_blob(self, data: bytes) -> str:
        """Keep these bytes; returns their SHA-256. Nothing is written when they are there already."""
        name = digest(data)
        path = self._blob_path(name)
        if not path.exists():
            write_atomically(path, data)
        return name

    def has_blob(self, name: str) -> bool:
        """Whether bytes of this SHA-256 are kept."""
        return self._blob_path(name).exists()

    def get_blob(self, name: str) -> bytes:
        """The bytes of this SHA-256, checked. Raises StoreError if they are missing or damaged."""
        path = self._blob_path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing from the store. Materialize raw_chapters again.") from error
        if digest(data) != name:
            raise StoreError(f"{path} is damaged. Delete it and materialize raw_chapters again.")
        return data

    def _blob_path(self, name: str) -> Path:
        return self.root / "blobs" / name[:2] / name

    # Artifacts

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact of this kind and key, or None. Does not read its files: see Artifact.verify."""
        folder = self._artifact_path(kind, key)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            expected = _manifest(kind, key, manifest["about"], manifest["files"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder / MANIFEST} is damaged ({error!r}). {_REPAIR.format(folder)}") from error
        if manifest != expected:
            raise StoreError(
                f"{folder / MANIFEST} is damaged: its hash is not the one recorded. {_REPAIR.format(folder)}"
            )
        return Artifact(kind, key, folder, manifest["about"], manifest["files"])

    def get(self, kind: str, key: str) -> Artifact:
        """The artifact of this kind and key, its bytes checked. Raises StoreError if missing or damaged."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise StoreError(f"The store {self.root} has no {kind} {key}. Materialize {kind} again.")
        artifact.verify()
        return artifact

    def take_in(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        """Move a finished folder into the store, whole. What is there already under this key is kept.

        Raises:
            StoreError: what is there is damaged.
        """
        target = self._artifact_path(kind, key)
        if (existing := self.find(kind, key)) is not None:
            shutil.rmtree(folder)
            return existing
        files = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / MANIFEST
        }
        plain = json.loads(json.dumps(dict(about)))  # as it will be read back
        content = json.dumps(_manifest(kind, key, plain, files), indent=1, ensure_ascii=False)
        write_atomically(folder / MANIFEST, content)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # an attempt's folder, and a store on another disk
                return self._take_in_copy(kind, key, folder, plain)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (existing := self.find(kind, key)) is None:  # not another process that finished the same work first
                raise StoreError(f"{target} is in the way, without a manifest. {_REPAIR.format(target)}") from error
            shutil.rmtree(folder)
            return existing
        return Artifact(kind, key, target, plain, files)

    def _take_in_copy(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        with self.staging() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            artifact = self.take_in(kind, key, copy, about)
        shutil.rmtree(folder)
        return artifact

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's own disk, to build an artifact in; gone afterwards if not taken in."""
        parent = self.root / "staging"
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as name:
            folder = Path(name) / "artifact"
            folder.mkdir()
            yield folder

    def _artifact_path(self, kind: str, key: str) -> Path:
        return self.root / kind / key
