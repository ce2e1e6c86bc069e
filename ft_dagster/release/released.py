"""`./fine_tuned_model/`: a symbolic link to one complete released adapter, replaced in one step.

Each release has its own folder under `.ft/released/`, which is complete before the link points to it and never changes
afterwards. A reader therefore finds a complete adapter at any time, and can keep reading one that has been replaced.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock

from ft_dagster.config.settings import Settings
from ft_dagster.errors import UserError
from ft_dagster.model.manifest import AdapterError, check_files, read_manifest
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Artifact, Store, StoreError, write_atomically
from ft_dagster.store.shared import open_store
from ft_dagster.training.request import KIND as ADAPTER

_HASH = "hash"
"""Field of a history entry that contains the hash of the other fields."""

CODE_VERSION = "1"
"""Increased by hand when the same verdict would result in another released adapter."""


class ReleaseError(UserError):
    """A release cannot be read, switched, exported or published; the message says what to do."""


class Releases:
    """The released adapter of a workspace, and the history of its releases."""

    def __init__(self, link: Path, state: Path) -> None:
        """`link` is `fine_tuned_model` of the workspace, and `state` is its `.ft/` folder."""
        self.link = link
        self.folder = state / "released"
        self._history = self.folder / "history.jsonl"

    def current(self) -> str | None:
        """Return the key of the released adapter; None if there is none, or the link does not point to a release."""
        if not self.link.is_symlink():
            return None
        target = self.link.resolve()
        return target.name if target.parent == self.folder.resolve() and target.is_dir() else None

    def current_folder(self) -> Path | None:
        """Return the folder of the released adapter, or None."""
        key = self.current()
        return self.folder / key if key else None

    def measured(self) -> str | None:
        """Return the key of the adapter that was measured for the released one: itself, unless it is a refit."""
        key = self.current()
        entries = (entry for entry in reversed(self.history()) if entry["adapter"] == key)
        return next((str(entry.get("measured", key)) for entry in entries), key)

    def measured_folder(self, store: Store) -> Path | None:
        """Return the folder of that adapter, or None if none is released.

        Raises:
            StoreError: the adapter is a refit, and neither the releases nor the store have the measured one.
        """
        key = self.measured()
        if key is None or (self.folder / key).is_dir():
            return self.folder / key if key else None
        return store.get(ADAPTER, key).path

    def release(self, adapter: Artifact, why: Mapping[str, Any]) -> Path | None:
        """Make an adapter the released one. If it is released already, nothing changes.

        Args:
            adapter: adapter to release, whose files are checked before anything is switched.
            why: the verdict, for the history.

        Returns:
            The path to which a folder at `fine_tuned_model` (such as the original script's output) was moved, or None.

        Raises:
            StoreError: a file of the adapter, or of its copy from an earlier release, is missing or damaged.
            ReleaseError: the workspace's file system does not support symbolic links.
        """
        if self.current() == adapter.key:
            return None
        adapter.verify()
        with self._lock():
            return self._release(adapter, why)

    def roll_back(self, key: str, why: Mapping[str, Any]) -> Path | None:
        """Release an adapter again that was in use before, from its existing folder.

        Args:
            key: key of the adapter.
            why: the decision, for the history.

        Returns:
            The same as `release`.

        Raises:
            ReleaseError: the adapter was never in use here or is in use now, its folder was removed, or one of its
                files is damaged.
        """
        if key not in {entry["adapter"] for entry in self.history()}:
            raise ReleaseError(
                f"The adapter {key} was never in use here. `ft-dagster release list` shows those that were."
            )
        if key == self.current():
            raise ReleaseError(f"The adapter {key} is in use already.")
        target = self.folder / key
        if not target.is_dir():
            raise ReleaseError(
                f"The files of {key} were removed. Use `ft-dagster release promote` if it is in the store."
            )
        try:
            manifest = read_manifest(target)
            check_files(target, manifest)
        except AdapterError as error:
            raise ReleaseError(f"{error} Nothing was changed.") from error
        with self._lock():
            aside = self._switch(target)
            self._record(key, why, back=True, measured=manifest.refit_of)
        return aside

    def learned(self, store: Store) -> set[str]:
        """Return the hashes of the sections that the adapter in use was trained on, or the one measured for it.

        There are none if no adapter is in use, or if its manifest cannot be read.
        """
        try:
            folder = self.measured_folder(store)
            return {item["section"] for item in read_manifest(folder).trained_on} if folder else set()
        except (AdapterError, StoreError):  # the evaluation will name it
            return set()

    def before(self) -> str:
        """Return the key of the adapter that was in use before the current one.

        After a rollback, this is the adapter before the one that was rolled back to.

        Raises:
            ReleaseError: no other adapter was in use before.
        """
        line: list[str] = []
        for entry in self.history():
            if entry.get("back") and entry["adapter"] in line:
                place = len(line) - 1 - line[::-1].index(entry["adapter"])
                del line[place + 1 :]
            else:
                line.append(entry["adapter"])
        earlier = [key for key in line if key != self.current()]
        if not earlier:
            raise ReleaseError("No other adapter was in use before this one.")
        return earlier[-1]

    def chosen_by_hand(self) -> bool:
        """Whether a person released the adapter in use. Then only a changed report, recipe or base replaces it."""
        history = self.history()
        return bool(history) and history[-1]["adapter"] == self.current() and "by" in history[-1]["why"]

    def proven(self) -> set[str]:
        """Return the keys of adapters that were in use, or measured for one, except those that a person took out."""
        return {key for entry in self.history() for key in _adapters_of(entry)} - self.withdrawn()

    def withdrawn(self) -> set[str]:
        """Return the keys of adapters that a person took out of use and has not put back since."""
        withdrawn: set[str] = set()
        for before, after in pairwise(self.history()):
            if "by" in after["why"]:
                withdrawn |= _adapters_of(before)
                withdrawn -= _adapters_of(after)
        return withdrawn

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def _release(self, adapter: Artifact, why: Mapping[str, Any]) -> Path | None:
        measured = read_manifest(adapter.path).refit_of
        if measured and (stands_for_it := adapter.store.find(ADAPTER, measured)):
            stands_for_it.verify()
            self._copy(stands_for_it)  # the next gate needs it, whatever becomes of the store
        target = self._copy(adapter)
        replace(adapter, path=target).verify()  # an earlier release may have been damaged since
        aside = self._switch(target)
        self._record(adapter.key, why, measured=measured)
        return aside

    def _copy(self, adapter: Artifact) -> Path:
        """Copy an adapter to the releases, unless it is there, and return its folder."""
        target = self.folder / adapter.key
        if not target.exists():
            unfinished = self.folder / f".{adapter.key}.{os.getpid()}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(adapter.path, unfinished)
            _sync(unfinished)
            unfinished.rename(target)
        return target

    def history(self) -> list[dict[str, Any]]:
        """Return every release, oldest first: `adapter`, `at` (UTC), `why` (with `decision` and `reason`).

        Rollbacks also have `back`, and refits `measured`, the adapter that was measured in their place.

        Raises:
            ReleaseError: a line is damaged.
        """
        if not self._history.exists():
            return []
        return [self._entry(number, line) for number, line in enumerate(self._history.read_bytes().splitlines(), 1)]

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(line)
            if entry.pop(_HASH, None) not in (None, digest(entry)):  # None: an earlier version wrote the line
                raise ValueError("its hash is not the one recorded")
            if not (isinstance(entry["adapter"], str) and "why" in entry):
                raise ValueError("it names no adapter")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ReleaseError(
                f"Line {number} of {self._history} is damaged ({error}). Restore it, or delete the line: then only "
                "the record of that release is lost."
            ) from None
        return entry

    def _move_aside(self) -> Path | None:
        """Rename a folder or foreign link at the path of our link, so that it is kept. Returns its new path, if any."""
        if self.link.is_symlink() and self.link.readlink().parts[:2] == (self.folder.parent.name, self.folder.name):
            return None
        if not os.path.lexists(self.link):
            return None
        number = 1
        while os.path.lexists(aside := self.link.with_name(f"{self.link.name}.before-{number}")):
            number += 1
        self.link.rename(aside)
        return aside

    def _switch(self, target: Path) -> Path | None:
        """Point the link at `target` by renaming a new link over it: the one atomic step of a release.

        The new link is made first, so that nothing else changes if the file system does not support links. Returns the
        path to which anything else at the link's path was moved, if any.
        """
        fresh = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        try:
            fresh.symlink_to(os.path.relpath(target, self.link.parent), target_is_directory=True)
        except OSError as error:
            raise ReleaseError(
                f"{self.link.parent} does not support symbolic links ({error.strerror}), which an atomic release "
                "needs. Put the workspace on another file system."
            ) from error
        aside = self._move_aside()
        fresh.replace(self.link)
        return aside

    def _record(self, key: str, why: Mapping[str, Any], back: bool = False, measured: str = "") -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry: dict[str, Any] = {"adapter": key, "at": at, "why": dict(why)}
        entry |= ({"back": True} if back else {}) | ({"measured": measured} if measured else {})
        lines = [json.dumps(i | {_HASH: digest(i)}, ensure_ascii=False) for i in (*self.history(), entry)]
        write_atomically(self._history, "\n".join(lines) + "\n")


def _adapters_of(entry: Mapping[str, Any]) -> set[str]:
    """Return the adapter of a release, and the one that was measured in its place."""
    return {entry["adapter"], entry.get("measured", entry["adapter"])}


def adapter_folder(settings: Settings, beginning: str) -> Path:
    """Return the folder of an adapter in the store, by the beginning of its key, or of the released adapter.

    Args:
        settings: settings of the workspace.
        beginning: beginning of the key; empty for the released adapter.

    Raises:
        ReleaseError: no adapter is released.
        StoreError: there is not exactly one adapter whose key begins in this way.
    """
    if beginning:
        return open_store(settings).match(ADAPTER, beginning).path
    if not settings.fine_tuned_model.exists():
        raise ReleaseError(f"Nothing is released in {settings.workspace}. Run `ft-dagster run` first.")
    return settings.fine_tuned_model.resolve()


def _sync(folder: Path) -> None:
    """Flush the folder's files to disk, before anything points to them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
