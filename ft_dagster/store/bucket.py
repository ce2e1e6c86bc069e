"""Read and write objects below a URL such as `s3://bucket/prefix`, through fsspec.

Each object is written in one step and checked when it is downloaded. Credentials and the server's address come from the
environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) or from `~/.aws`, never from the URL.
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
"""Environment variables that name a server other than Amazon's."""
_CONCURRENT_REQUESTS = 32
"""The number of requests that are made at the same time."""
_NO_CONDITIONAL_WRITE = (errno.ENOSYS, errno.EINVAL)
"""Error numbers with which a server reports that it does not support conditional writes."""


@dataclass(frozen=True)
class Entry:
    """An object as it appears in a listing."""

    size: int
    version: str
    """Version of the object, which changes when its content changes."""
    at: float
    """When the object was written, in seconds since 1970 by the server's clock."""


class Bucket:
    """The named objects below a URL."""

    def __init__(self, url: str) -> None:
        """Set up access to the URL without connecting. Raises StoreError if the URL cannot be used."""
        self.url = url.rstrip("/")
        options: dict[str, Any] = {}
        if self.url.startswith("s3://"):
            options = {"use_listings_cache": False}
            # fsspec reuses a client with the same options; without the endpoint, it could be that of another server.
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
        """Return the bytes of an object, or None if it does not exist."""
        with self._store_errors():
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return name -> bytes of the objects that exist."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with self._store_errors():
            found = self._files.cat(list(paths), on_error="return", batch_size=_CONCURRENT_REQUESTS)
            for error in found.values():
                if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                    raise error
        return {paths[path]: bytes(data) for path, data in found.items() if not isinstance(data, Exception)}

    def write(self, name: str, data: bytes) -> None:
        """Write an object in one step."""
        self.write_many({name: data})

    def write_many(self, contents: Mapping[str, bytes]) -> None:
        """Write objects, each of them in one step."""
        with self._store_errors():
            self._files.pipe(
                {self._path(name): data for name, data in contents.items()}, batch_size=_CONCURRENT_REQUESTS
            )

    def write_first(self, name: str, data: bytes) -> bytes:
        """Write an object unless it exists, and return the content that it has afterwards.

        If the server does not support conditional writes, the last of several writers wins. A reader then sees the
        content of one of them.
        """
        path = self._path(name)
        with self._store_errors():
            try:
                self._files.pipe_file(path, data, mode="create")
                return data
            except OSError as error:
                there = self.read(name)
                if there is not None:
                    return there
                if error.errno not in _NO_CONDITIONAL_WRITE:
                    raise
            self._files.pipe_file(path, data)
            return data

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, except those whose object has the same size: a name always means the same content here."""
        there = self.entries(files)
        missing = {name: path for name, path in files.items() if not _has(there[name], path.stat().st_size)}
        if missing:
            with self._store_errors():
                paths, sources = [self._path(name) for name in missing], [str(path) for path in missing.values()]
                self._files.put(sources, paths, batch_size=_CONCURRENT_REQUESTS)

    def entries(self, names: Iterable[str]) -> dict[str, Entry | None]:
        """Return name -> entry of each object; None for an object that does not exist."""
        names = list(names)

        def entry(name: str) -> Entry | None:
            try:
                return _entry(self._files.info(self._path(name)))
            except FileNotFoundError:
                return None

        with self._store_errors(), ThreadPoolExecutor(min(_CONCURRENT_REQUESTS, len(names) or 1)) as pool:
            return dict(zip(names, pool.map(entry, names), strict=True))

    def fetch(self, files: Mapping[Path, str], hashes: Mapping[str, str], repair: str) -> None:
        """Download objects and check their hashes.

        Args:
            files: local path -> name of each object. No other process reads the folder of these paths yet.
            hashes: name -> expected SHA-256 of each object.
            repair: what to do if an object is damaged or missing, for the error message.

        Raises:
            StoreError: an object is missing, or its hash is not the expected one.
        """
        with self._store_errors():
            try:
                names = [self._path(name) for name in files.values()]
                self._files.get(names, [str(path) for path in files], batch_size=_CONCURRENT_REQUESTS)
            except FileNotFoundError:
                gone = next((name for name, entry in self.entries(files.values()).items() if not entry), "an object")
                raise StoreError(f"{self.url}/{gone} is missing from the store. {repair}") from None
        for path, name in files.items():
            if file_digest(path) != hashes[name]:
                raise StoreError(f"{self.url}/{name} is damaged: its hash is not the one recorded. {repair}")

    def list(self, folder: str) -> dict[str, Entry]:
        """Return name -> entry of every object below a folder, including those in its subfolders."""
        with self._store_errors():
            found = self._files.find(self._path(folder), detail=True)
        return {path[len(self._root) + 1 :]: _entry(about) for path, about in found.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects. Objects that do not exist are ignored."""
        paths = [self._path(name) for name in names]
        if paths:
            with self._store_errors(), suppress(FileNotFoundError):
                self._files.rm(paths)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Convert the errors of the S3 client to StoreError."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # errors of the client's transport have no class in common
            reason = f"{type(error).__name__}: {redacted(str(error))}"
            raise StoreError(
                f"The store {self.url} cannot be used: {reason}. Check the bucket, the network, and the "
                "credentials and AWS_ENDPOINT_URL in the environment. Finished work is kept."
            ) from error


def endpoint_url() -> str | None:
    """Return the address of the server that the environment names, or None."""
    return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)


def _has(entry: Entry | None, size: int) -> bool:
    return entry is not None and entry.size == size


def _entry(about: Mapping[str, Any]) -> Entry:
    at = about.get("LastModified") or about.get("mtime") or 0.0
    seconds = at.timestamp() if hasattr(at, "timestamp") else float(at)
    return Entry(int(about["size"]), f"{about.get('ETag', '')}{seconds}", seconds)
