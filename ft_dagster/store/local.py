"""Content-addressed artifacts: what each stage made, kept whole and checked when read.

Two kinds of things live in a store:

* **blobs**: the bytes of one file, named by their SHA-256 (chapter texts, shards);
* **artifacts**: a folder that one stage made, named by (kind, key). It is taken in with one rename, after
  its `artifact.json` has been written with the hash of every file, so that a reader sees it whole or not at all.
  What is large and changes in parts is kept as blobs that the folder names, so that two artifacts share what they
  have in common.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_dagster.errors import UserError
from ft_dagster.store.hashing import digest, file_digest

MANIFEST = "artifact.json"


class StoreError(UserError):
    """Something in the store is missing or is not what its name says."""


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


def with_usual_rights(folder: Path) -> None:
    """Give the files of a folder the rights that a new file gets here, so that whoever may read the folder can use it.

    safetensors writes files that nobody but the user may read, whatever the umask says.
    """
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    rights = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights)


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
    store: "Store"

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """The artifact whose folder this is. Raises StoreError if it is none, or damaged.

        Reads from that folder and from the blobs beside it alone, also where these are copies of what a bucket holds.
        """
        store = Store(folder.parent.parent)
        artifact = store.find(folder.parent.name, folder.name)
        if artifact is None:
            raise StoreError(f"{folder} is no artifact: it has no {MANIFEST}.")
        return artifact

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder, its bytes checked."""
        return json.loads(self.store.read_file(self, name))

    def verify(self) -> None:
        """Bring the files here where they are not; raise StoreError, naming the file, if a byte is not what was taken
        in."""
        self.store.bring(self)
        for name, expected in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise StoreError(f"{path} is missing from the store. {self.repair}")
            if file_digest(path) != expected:
                raise StoreError(f"{path} is damaged: its hash is not the one recorded. {self.repair}")

    @property
    def repair(self) -> str:
        """What to do where a file of it is damaged or missing."""
        return _REPAIR.format(self.path)


_REPAIR = "Delete {} and run `ft-dagster run`: it is made again from what it was made of."
_BATCH_BYTES, _BATCH_BLOBS = 64 * 2**20, 1024


def _manifest(kind: str, key: str, about: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """What artifact.json holds. Its own hash is in it: the other files' hashes are only worth what it is."""
    content = {"kind": kind, "key": key, "about": about, "files": files}
    return content | {"hash": digest(content)}


def manifest_text(kind: str, key: str, about: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of artifact.json."""
    return json.dumps(_manifest(kind, key, about, files), indent=1, ensure_ascii=False)


class Store:
    """A store in a local folder."""

    url: str | None = None
    """Where it is kept, if that is not the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return self.url or str(self.root)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, `cleaning` is refused: what is read and written stays."""
        with _locked(self.root, fcntl.LOCK_SH):
            yield

    @contextmanager
    def cleaning(self, patience: float = 5.0) -> Iterator[None]:
        """While this lasts, nobody else uses the store.

        Args:
            patience: seconds to wait for whoever uses it now; a tick of the sensor takes less, a run more.

        Raises:
            StoreError: somebody uses it.
        """
        until = time.monotonic() + patience
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(_locked(self.root, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    break
                except BlockingIOError as error:
                    if time.monotonic() > until:
                        message = f"The store {self.root} is in use by a run. Try again when it has ended."
                        raise StoreError(message) from error
                    time.sleep(0.1)
            yield

    # Blobs

    def put_blobs(self, contents: Iterable[bytes]) -> list[str]:
        """Keep many; returns their SHA-256. One flush of the disk for each batch instead of one for each blob."""
        names: list[str] = []
        waiting: dict[Path, Path] = {}
        size = 0
        try:
            for data in contents:
                names.append(digest(data))
                path = self.blob_path(names[-1])
                if path in waiting or path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
                waiting[path] = fresh
                fresh.write_bytes(data)
                size += len(data)
                if size > _BATCH_BYTES or len(waiting) >= _BATCH_BLOBS:
                    self._settle(waiting)
                    size = 0
            self._settle(waiting)
        finally:
            for fresh in waiting.values():
                fresh.unlink(missing_ok=True)
        return names

    def _settle(self, waiting: dict[Path, Path]) -> None:
        """Give blobs their names, once their bytes are on the disk."""
        if waiting:
            os.sync()
        for path, fresh in list(waiting.items()):
            fresh.replace(path)
            del waiting[path]

    def blobs(self) -> set[str]:
        """The SHA-256 of all that is kept."""
        folder = self.root / "blobs"
        try:
            parts = os.listdir(folder)  # noqa: PTH208 - names of a hundred thousand files, without an object each
        except FileNotFoundError:
            return set()
        return {name for part in parts for name in os.listdir(folder / part) if name[0] != "."}  # noqa: PTH208

    def has_blob(self, name: str) -> bool:
        """Whether bytes of this SHA-256 are kept."""
        return self.blob_path(name).exists()

    def get_blob(self, name: str) -> bytes:
        """The bytes of this SHA-256, checked. Raises StoreError if they are missing or damaged."""
        path = self.blob_path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing from the store. {self._repair_blob('')}") from error
        if digest(data) != name:
            raise StoreError(f"{path} is damaged. {self._repair_blob('it and ')}")
        return data

    def _repair_blob(self, also: str) -> str:
        return (
            f"Delete {also}the folders raw_chapters, sections and tokenized_dataset in {self}, and run "
            "`ft-dagster run`: they are made again from the reports."
        )

    def blob_path(self, name: str) -> Path:
        """Where the bytes of this SHA-256 are, or would be."""
        return self.root / "blobs" / name[:2] / name

    def bring_blobs(self, names: Iterable[str]) -> None:
        """Have these at `blob_path`, many at a time: for whoever reads one after the other. Here they always are."""

    # Artifacts

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact of this kind and key, or None. Does not read its files: see Artifact.verify."""
        try:
            content = (self._artifact_path(kind, key) / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._read_manifest(kind, key, content)

    def _read_manifest(self, kind: str, key: str, content: bytes) -> Artifact:
        folder = f"{self}/{kind}/{key}"
        try:
            manifest = json.loads(content)
            expected = _manifest(kind, key, manifest["about"], manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder}/{MANIFEST} is damaged ({error!r}). {_REPAIR.format(folder)}") from error
        if manifest != expected:
            raise StoreError(
                f"{folder}/{MANIFEST} is damaged: its hash is not the one recorded. {_REPAIR.format(folder)}"
            )
        return Artifact(kind, key, self._artifact_path(kind, key), manifest["about"], manifest["files"], self)

    def taken_in(self, artifact: Artifact) -> float:
        """When an artifact was taken in, in seconds since 1970."""
        return artifact.path.stat().st_mtime

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        """A file of an artifact, checked. Raises StoreError if it is missing or damaged."""
        path = artifact.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing from the store. {artifact.repair}") from error
        if digest(data) != artifact.files.get(name):
            raise StoreError(f"{path} is damaged: its hash is not the one recorded. {artifact.repair}")
        return data

    def bring(self, artifact: Artifact) -> None:
        """Have an artifact's folder here, with all of its files. Here it always is."""

    def newest(self, kind: str, **about: Any) -> Artifact | None:
        """The artifact of this kind that was taken in last, among those that say this of themselves."""
        fitting = (a for a in self.all(kind) if all(a.about.get(name) == value for name, value in about.items()))
        return next(fitting, None)

    def all(self, kind: str) -> Iterator[Artifact]:
        """The artifacts of this kind, those that were taken in last first."""
        for key in self.keys(kind):
            if found := self.find(kind, key):
                yield found

    def keys(self, kind: str) -> list[str]:
        """The keys of what is there of this kind, those that were taken in last first."""
        folder = self.root / kind
        present = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
        return [path.name for path in sorted(present, key=lambda path: -path.stat().st_mtime_ns)]

    def get(self, kind: str, key: str) -> Artifact:
        """The artifact of this kind and key, its bytes checked. Raises StoreError if missing or damaged."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise StoreError(f"The store {self} has no {kind} {key}. Materialize {kind} again.")
        artifact.verify()
        return artifact

    def match(self, kind: str, beginning: str) -> Artifact:
        """The one artifact whose key begins so. Raises StoreError if there is none, or more than one."""
        keys = sorted(key for key in self.keys(kind) if key.startswith(beginning))
        if len(keys) == 1:
            return self.get(kind, keys[0])
        found = "several, " + ", ".join(key[:12] for key in keys[:5]) if beginning and keys else "none"
        raise StoreError(f"There is not one {kind} whose key begins with {beginning!r} in {self}, but {found}.")

    def take_in(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        """Move a finished folder into the store, whole. What is there already under this key is kept.

        Raises:
            StoreError: what is there is damaged.
        """
        if (existing := self.find(kind, key)) is not None:
            shutil.rmtree(folder)
            return existing
        sealed = self._seal(kind, key, folder, about)
        return self._publish(sealed) or self._move_in(sealed)

    def _seal(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        """Write the manifest into a finished folder, which then is an artifact that is not in its place yet."""
        files = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / MANIFEST
        }
        with_usual_rights(folder)
        plain = json.loads(json.dumps(dict(about)))  # as it will be read back
        write_atomically(folder / MANIFEST, manifest_text(kind, key, plain, files))
        return Artifact(kind, key, folder, plain, files, self)

    def _publish(self, sealed: Artifact) -> Artifact | None:
        """Show it to others first, where the store has others; gives what they had under this key before."""
        return None

    def _move_in(self, sealed: Artifact) -> Artifact:
        target = self._artifact_path(sealed.kind, sealed.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            sealed.path.rename(target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # an attempt's folder, and a store on another disk
                return self._move_in_copy(sealed)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return self._give_way(sealed, target)
        return replace(sealed, path=target)

    def _move_in_copy(self, sealed: Artifact) -> Artifact:
        with self.staging() as copy:
            shutil.copytree(sealed.path, copy, dirs_exist_ok=True)
            artifact = self._move_in(replace(sealed, path=copy))
        shutil.rmtree(sealed.path)
        return artifact

    def _give_way(self, sealed: Artifact, target: Path) -> Artifact:
        """To another process that finished the same work first, if that is what stands in the way."""
        if (existing := self.find(sealed.kind, sealed.key)) is None:
            raise StoreError(f"{target} is in the way, without a manifest. {_REPAIR.format(target)}")
        shutil.rmtree(sealed.path)
        return existing

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


@contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    """The operating system's lock, which ends with the process."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("ab") as file:
        fcntl.flock(file, how)
        yield
