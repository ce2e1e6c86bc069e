"""A content-addressed store of what each stage made, which is committed in one step and checked when it is read.

A store contains:

* **blobs**: the bytes of one file, named by their SHA-256 (chapter texts, shards);
* **artifacts**: a folder that one stage made, named by (kind, key). It is committed with one rename, after its
  `artifact.json` has been written with the hash of every file, so that a reader sees all of it or nothing.
  Large data that changes in parts is kept as blobs that the folder names, so that two artifacts share the blobs that
  they have in common.
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
    """Something in the store is missing, damaged, unreachable or in use."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # mkstemp would make a file that other users cannot read
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
    """Give the files of a folder the permissions of a new file, so that anyone who can read the folder can use it.

    safetensors writes files that only their owner can read, whatever the umask is.
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
    """A folder in the store that one stage made. Its manifest was written last."""

    kind: str
    key: str
    path: Path
    about: Mapping[str, Any]
    """What the stage recorded about the artifact, as plain JSON."""
    files: Mapping[str, str]
    """Relative path -> SHA-256 of every file in the folder, except the manifest."""
    store: "Store"

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """Return the artifact in a folder. Raises StoreError if it is not an artifact, or its manifest is damaged.

        The artifact reads only from that folder and the blobs beside it, even if they are copies from a bucket.
        """
        store = Store(folder.parent.parent)
        artifact = store.find(folder.parent.name, folder.name)
        if artifact is None:
            raise StoreError(f"{folder} is not an artifact: it has no {MANIFEST}.")
        return artifact

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file of the artifact, after checking its hash."""
        return json.loads(self.store.read_file(self, name))

    def verify(self) -> None:
        """Fetch the files that are not available locally, and check the hash of every file.

        Raises:
            StoreError: a file is missing or damaged; the message names it.
        """
        self.store.fetch(self)
        for name, expected in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise StoreError(f"{path} is missing from the store. {self.repair}")
            if file_digest(path) != expected:
                raise StoreError(f"{path} is damaged: its hash is not the one recorded. {self.repair}")

    @property
    def repair(self) -> str:
        """What to do if a file of the artifact is damaged or missing, for error messages."""
        return _REPAIR.format(self.path)


_REPAIR = "Delete {} and run `ft-dagster run`, which makes it again from its inputs."
_BATCH_BYTES, _BATCH_BLOBS = 64 * 2**20, 1024


def _manifest(kind: str, key: str, about: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of artifact.json. It includes a hash of itself, which protects the hashes of the files."""
    content = {"kind": kind, "key": key, "about": about, "files": files}
    return content | {"hash": digest(content)}


def manifest_text(kind: str, key: str, about: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the text of artifact.json."""
    return json.dumps(_manifest(kind, key, about, files), indent=1, ensure_ascii=False)


class Store:
    """A store in a local folder."""

    url: str | None = None
    """Where the store is kept, if that is not its local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return self.url or str(self.root)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Refuse `cleaning` within this context, so that nothing is deleted that is read or written in it."""
        with _locked(self.root, fcntl.LOCK_SH):
            yield

    @contextmanager
    def cleaning(self, patience: float = 5.0) -> Iterator[None]:
        """Keep all other processes from using the store within this context.

        Args:
            patience: seconds to wait while the store is in use; a tick of the sensor takes less, a run more.

        Raises:
            StoreError: the store is still in use after that time.
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
        """Store blobs and return their SHA-256. The disk is flushed once for each batch, not once for each blob."""
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
                    self._finish_blobs(waiting)
                    size = 0
            self._finish_blobs(waiting)
        finally:
            for fresh in waiting.values():
                fresh.unlink(missing_ok=True)
        return names

    def _finish_blobs(self, waiting: dict[Path, Path]) -> None:
        """Flush the disk, then give the waiting blobs their final names."""
        if waiting:
            os.sync()
        for path, fresh in list(waiting.items()):
            fresh.replace(path)
            del waiting[path]

    def blobs(self) -> set[str]:
        """Return the SHA-256 of every blob in the store."""
        folder = self.root / "blobs"
        try:
            parts = os.listdir(folder)  # noqa: PTH208 - no Path object for each of 100,000 files
        except FileNotFoundError:
            return set()
        return {name for part in parts for name in os.listdir(folder / part) if name[0] != "."}  # noqa: PTH208

    def has_blob(self, name: str) -> bool:
        """Whether the store has the blob with this SHA-256."""
        return self.blob_path(name).exists()

    def get_blob(self, name: str) -> bytes:
        """Return the bytes of a blob, after checking their hash. Raises StoreError if it is missing or damaged."""
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
            "`ft-dagster run`, which makes them again from the reports."
        )

    def blob_path(self, name: str) -> Path:
        """Return the local path of a blob, whether or not it exists."""
        return self.root / "blobs" / name[:2] / name

    def fetch_blobs(self, names: Iterable[str]) -> None:
        """Make blobs available at `blob_path`, many at a time, before they are read one by one.

        In a local store they always are.
        """

    # Artifacts

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact of this kind and key, or None. Its files are not read: see Artifact.verify."""
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

    def committed_at(self, artifact: Artifact) -> float:
        """Return when an artifact was committed, in seconds since 1970."""
        return artifact.path.stat().st_mtime

    def read_file(self, artifact: Artifact, name: str) -> bytes:
        """Return the bytes of a file, after checking their hash. Raises StoreError if it is missing or damaged."""
        path = artifact.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing from the store. {artifact.repair}") from error
        if digest(data) != artifact.files.get(name):
            raise StoreError(f"{path} is damaged: its hash is not the one recorded. {artifact.repair}")
        return data

    def fetch(self, artifact: Artifact) -> None:
        """Make an artifact's folder available locally with all of its files. In a local store it always is."""

    def newest(self, kind: str, **about: Any) -> Artifact | None:
        """Return the newest artifact of this kind whose `about` contains these values, or None."""
        fitting = (a for a in self.all(kind) if all(a.about.get(name) == value for name, value in about.items()))
        return next(fitting, None)

    def all(self, kind: str) -> Iterator[Artifact]:
        """Yield the artifacts of this kind, newest first."""
        for key in self.keys(kind):
            if found := self.find(kind, key):
                yield found

    def keys(self, kind: str) -> list[str]:
        """Return the keys of the artifacts of this kind, newest first."""
        folder = self.root / kind
        present = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
        return [path.name for path in sorted(present, key=lambda path: -path.stat().st_mtime_ns)]

    def get(self, kind: str, key: str) -> Artifact:
        """Return the artifact of this kind and key, after `verify`. Raises StoreError if it is missing or damaged."""
        artifact = self.find(kind, key)
        if artifact is None:
            raise StoreError(f"The store {self} has no {kind} {key}. Materialize {kind} again.")
        artifact.verify()
        return artifact

    def match(self, kind: str, beginning: str) -> Artifact:
        """Return the one artifact whose key starts with `beginning`, after `verify`.

        Raises:
            StoreError: there is none or more than one, or the artifact is damaged.
        """
        keys = sorted(key for key in self.keys(kind) if key.startswith(beginning))
        if len(keys) == 1:
            return self.get(kind, keys[0])
        found = f"{len(keys)} (" + ", ".join(key[:12] for key in keys[:5]) + ")" if beginning and keys else "none"
        raise StoreError(
            f"There is not exactly one {kind} whose key begins with {beginning!r} in {self}: found {found}."
        )

    def commit(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        """Move a finished folder into the store in one step. If the key exists already, its artifact is kept instead.

        Raises:
            StoreError: the existing artifact is damaged.
        """
        if (existing := self.find(kind, key)) is not None:
            shutil.rmtree(folder)
            return existing
        sealed = self._seal(kind, key, folder, about)
        return self._publish(sealed) or self._move_in(sealed)

    def _seal(self, kind: str, key: str, folder: Path, about: Mapping[str, Any]) -> Artifact:
        """Write the manifest into a finished folder, which makes it an artifact that is not at its final path yet."""
        files = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / MANIFEST
        }
        with_usual_rights(folder)
        plain = json.loads(json.dumps(dict(about)))  # the values as they will be read back
        write_atomically(folder / MANIFEST, manifest_text(kind, key, plain, files))
        return Artifact(kind, key, folder, plain, files, self)

    def _publish(self, sealed: Artifact) -> Artifact | None:
        """Make an artifact visible to other machines, if the store is shared.

        Returns:
            The artifact that they had under this key already, or None.
        """
        return None

    def _move_in(self, sealed: Artifact) -> Artifact:
        target = self._artifact_path(sealed.kind, sealed.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            sealed.path.rename(target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # the attempt's folder and the store are on different disks
                return self._move_in_copy(sealed)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return self._use_existing(sealed, target)
        return replace(sealed, path=target)

    def _move_in_copy(self, sealed: Artifact) -> Artifact:
        with self.staging() as copy:
            shutil.copytree(sealed.path, copy, dirs_exist_ok=True)
            artifact = self._move_in(replace(sealed, path=copy))
        shutil.rmtree(sealed.path)
        return artifact

    def _use_existing(self, sealed: Artifact, target: Path) -> Artifact:
        """Return the artifact at `target`, which another process finished first, and delete this one."""
        if (existing := self.find(sealed.kind, sealed.key)) is None:
            raise StoreError(f"{target} already exists, but has no manifest. {_REPAIR.format(target)}")
        shutil.rmtree(sealed.path)
        return existing

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Provide an empty folder on the store's disk for a new artifact, which is deleted unless it is committed."""
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
    """Hold a lock of the operating system, which is released when the process ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("ab") as file:
        fcntl.flock(file, how)
        yield
