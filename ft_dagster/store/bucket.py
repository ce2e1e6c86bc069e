"""Objects below a URL such as `s3://bucket/prefix`, through fsspec: written whole, checked when they are read.

Credentials and the server's address come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) or from
`~/.aws`, and never stand in a URL.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_dagster.config.redaction import redacted
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import StoreError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables that name another server than Amazon's."""
_AT_ONCE = 32
"""Requests under way at a time."""
_REFUSALS = (errno.ENOSYS, errno.EINVAL)
"""How a server says that it knows no conditional write."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    size: int
    version: str
    """Another one for other content."""
    at: float
    """When it was written, by the server's clock."""


class Bucket:
    """Objects with names below a URL."""

    def __init__(self, url: str) -> None:
        """Raises StoreError if the URL cannot be used; connects to nothing."""
        self.url = url.rstrip("/")
        options: dict[str, Any] = {}
        if self.url.startswith("s3://"):
            options = {"use_listings_cache": False}
            # fsspec hands out an earlier client of the same options, which must not be that of another server.
            if endpoint := endpoint_url():
                options["endpoint_url"] = endpoint
        try:
            from fsspec.core import url_to_fs

            found = url_to_fs(self.url, **options)
        except ImportError as error:
            raise StoreError(
                f"FT_STORE is {self.url}, and the package for that is missing ({error}). Run `pip install "
                "ft_dagster[s3]`, or in a clone `pip install .[s3]`."
            ) from error
        except ValueError as error:
            raise StoreError(f"FT_STORE is {self.url}, which cannot be used: {error}.") from error
        self._files: AbstractFileSystem = found[0]
        self._root = str(found[1]).rstrip("/")

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, or None."""
        with self._spoken():
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of objects, without those that are not there."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with self._spoken():
            found = self._files.cat(list(paths), on_error="return", batch_size=_AT_ONCE)
            for error in found.values():
                if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                    raise error
        return {paths[path]: bytes(data) for path, data in found.items() if not isinstance(data, Exception)}

    def write(self, name: str, data: bytes) -> None:
        """Put an object in its place, in one step."""
        self.write_many({name: data})

    def write_many(self, contents: Mapping[str, bytes]) -> None:
        """Put objects in their places, each in one step."""
        with self._spoken():
            self._files.pipe({self._path(name): data for name, data in contents.items()}, batch_size=_AT_ONCE)

    def write_first(self, name: str, data: bytes) -> bytes:
        """Put an object in its place if nothing is there; gives what is there afterwards.

        Where the server knows no conditional write, the last of several writers wins: a reader sees one or the other.
        """
        path = self._path(name)
        with self._spoken():
            try:
                self._files.pipe_file(path, data, mode="create")
                return data
            except OSError as error:
                there = self.read(name)
                if there is not None:
                    return there
                if error.errno not in _REFUSALS:
                    raise
            self._files.pipe_file(path, data)
            return data

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, without those that are there in their full length: a name stands for one content here."""
        there = self.entries(files)
        missing = {name: path for name, path in files.items() if not _has(there[name], path.stat().st_size)}
        if missing:
            with self._spoken():
                paths, sources = [self._path(name) for name in missing], [str(path) for path in missing.values()]
                self._files.put(sources, paths, batch_size=_AT_ONCE)

    def entries(self, names: Iterable[str]) -> dict[str, Entry | None]:
        """What a listing says of each object; None where it is not there."""
        names = list(names)

        def entry(name: str) -> Entry | None:
            try:
                return _entry(self._files.info(self._path(name)))
            except FileNotFoundError:
                return None

        with self._spoken(), ThreadPoolExecutor(min(_AT_ONCE, len(names) or 1)) as pool:
            return dict(zip(names, pool.map(entry, names), strict=True))

    def fetch(self, files: Mapping[Path, str], hashes: Mapping[str, str], repair: str) -> None:
        """Download objects.

        Args:
            files: where each goes, in a folder that nobody reads yet -> its name.
            hashes: name -> SHA-256 that it must have.
            repair: what to do where one is damaged or missing, for the message.

        Raises:
            StoreError: one is missing, or its bytes are not those.
        """
        with self._spoken():
            try:
                names = [self._path(name) for name in files.values()]
                self._files.get(names, [str(path) for path in files], batch_size=_AT_ONCE)
            except FileNotFoundError:
                gone = next((name for name, entry in self.entries(files.values()).items() if not entry), "an object")
                raise StoreError(f"{self.url}/{gone} is missing from the store. {repair}") from None
        for path, name in files.items():
            if file_digest(path) != hashes[name]:
                raise StoreError(f"{self.url}/{name} is damaged: its hash is not the one recorded. {repair}")

    def list(self, folder: str) -> dict[str, Entry]:
        """Name -> what there is below a folder, its folders included."""
        with self._spoken():
            found = self._files.find(self._path(folder), detail=True)
        return {path[len(self._root) + 1 :]: _entry(about) for path, about in found.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        paths = [self._path(name) for name in names]
        if paths:
            with self._spoken(), suppress(FileNotFoundError):
                self._files.rm(paths)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """Translate the errors of the S3 client to StoreError."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # the client lets its transport's errors through, which share no class of its own
            said = f"{type(error).__name__}: {redacted(str(error))}"
            raise StoreError(
                f"The store {self.url} cannot be used: {said}. Check the bucket, the network, and in the environment "
                "AWS_ENDPOINT_URL and the credentials; what was finished is kept."
            ) from error


def endpoint_url() -> str | None:
    """The server that the environment names, if it names one."""
    return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)


def _has(entry: Entry | None, size: int) -> bool:
    return entry is not None and entry.size == size


def _entry(about: Mapping[str, Any]) -> Entry:
    at = about.get("LastModified") or about.get("mtime") or 0.0
    seconds = at.timestamp() if hasattr(at, "timestamp") else float(at)
    return Entry(int(about["size"]), f"{about.get('ETag', '')}{seconds}", seconds)
