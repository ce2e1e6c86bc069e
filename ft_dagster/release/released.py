"""`./fine_tuned_model/`: a symbolic link to one complete released adapter, replaced in one step.

Each release is a folder of its own under `.ft/released/`, complete before the link points to it and never changed
afterwards, so that a reader finds a whole adapter at every instant and may keep reading one that was replaced.
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
from ft_dagster.store.local import Artifact, write_atomically
from ft_dagster.store.shared import open_store
from ft_dagster.training.request import KIND as ADAPTER

_HASH = "hash"
"""Field of an entry of the history that holds the hash of the others."""

CODE_VERSION = "1"
"""Raised by hand when the same verdict would leave another released adapter."""


class ReleaseError(UserError):
    """The released adapter cannot be switched; the message says what to do."""


class Releases:
    """What is released in one workspace, and what was before."""

    def __init__(self, link: Path, state: Path) -> None:
        """`link`: `fine_tuned_model` of the workspace. `state`: its `.ft/` folder."""
        self.link = link
        self.folder = state / "released"
        self._history = self.folder / "history.jsonl"

    def current(self) -> str | None:
        """Key of the released adapter; None when there is none, or what is there is not a release of ours."""
        if not self.link.is_symlink():
            return None
        target = self.link.resolve()
        return target.name if target.parent == self.folder.resolve() and target.is_dir() else None

    def current_folder(self) -> Path | None:
        """Folder of the released adapter."""
        key = self.current()
        return self.folder / key if key else None

    def release(self, adapter: Artifact, why: Mapping[str, Any]) -> Path | None:
        """Make an adapter the released one. Releasing what is released changes nothing.

        Args:
            adapter: verified here before anything is switched.
            why: the verdict, for the history.

        Returns:
            Where a folder that stood at `fine_tuned_model` was moved to, if one did (the original script's output).

        Raises:
            StoreError: a byte of the adapter, or of the copy that was released before, is not what was stored.
            ReleaseError: the workspace's file system has no symbolic links.
        """
        if self.current() == adapter.key:
            return None
        adapter.verify()
        with self._lock():
            return self._release(adapter, why)

    def roll_back(self, key: str, why: Mapping[str, Any]) -> Path | None:
        """Put an adapter that was in use before back in use: its folder is still here.

        Args:
            key: of the adapter.
            why: for the history.

        Returns:
            As `release`.

        Raises:
            ReleaseError: it was never in use here, its folder was removed, or a file of it is damaged.
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
            check_files(target, read_manifest(target))
        except AdapterError as error:
            raise ReleaseError(f"{error} Nothing was changed.") from error
        with self._lock():
            aside = self._switch(target)
            self._record(key, why, back=True)
        return aside

    def before(self) -> str:
        """Key of the adapter that was in use before the current one; going back again goes further back.

        Raises:
            ReleaseError: there was none.
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
        """Whether a person put the adapter in use there: only a changed report, recipe or base undoes it."""
        history = self.history()
        return bool(history) and history[-1]["adapter"] == self.current() and "by" in history[-1]["why"]

    def proven(self) -> set[str]:
        """Keys of adapters that were in use, without those that a person took out of use."""
        return {entry["adapter"] for entry in self.history()} - self.withdrawn()

    def withdrawn(self) -> set[str]:
        """Keys of adapters that a person took out of use, and did not put back since."""
        withdrawn: set[str] = set()
        for before, after in pairwise(self.history()):
            if "by" in after["why"]:
                withdrawn.add(before["adapter"])
                withdrawn.discard(after["adapter"])
        return withdrawn

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def _release(self, adapter: Artifact, why: Mapping[str, Any]) -> Path | None:
        target = self.folder / adapter.key
        if not target.exists():
            unfinished = self.folder / f".{adapter.key}.{os.getpid()}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(adapter.path, unfinished)
            _sync(unfinished)
            unfinished.rename(target)
        replace(adapter, path=target).verify()  # an earlier release may have been damaged since
        aside = self._switch(target)
        self._record(adapter.key, why)
        return aside

    def history(self) -> list[dict[str, Any]]:
        """Every release, oldest first: `adapter`, `at` (UTC), `why` (at least `decision` and `reason`), `back`.

        Raises:
            ReleaseError: a line is damaged.
        """
        if not self._history.exists():
            return []
        return [self._entry(number, line) for number, line in enumerate(self._history.read_bytes().splitlines(), 1)]

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(line)
            if entry.pop(_HASH, None) not in (None, digest(entry)):  # none: written by an earlier version
                raise ValueError("its hash is not the one recorded")
            if not (isinstance(entry["adapter"], str) and "why" in entry):
                raise ValueError("it names no adapter")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ReleaseError(
                f"Line {number} of {self._history} is damaged ({error}). Restore it, or delete the line: what was in "
                "use then is forgotten, and nothing else."
            ) from None
        return entry

    def _make_way(self) -> Path | None:
        """A real folder or a foreign link at our place is kept under another name, never written over."""
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

        The new link is made first, so that where there can be none nothing else is touched. Returns where what
        stood in the way was moved to.
        """
        fresh = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        try:
            fresh.symlink_to(os.path.relpath(target, self.link.parent), target_is_directory=True)
        except OSError as error:
            raise ReleaseError(
                f"{self.link.parent} cannot hold symbolic links ({error.strerror}), which an atomic release needs. "
                "Put the workspace on another file system."
            ) from error
        aside = self._make_way()
        fresh.replace(self.link)
        return aside

    def _record(self, key: str, why: Mapping[str, Any], back: bool = False) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        entry: dict[str, Any] = {"adapter": key, "at": at, "why": dict(why)}
        entry |= {"back": True} if back else {}
        lines = [json.dumps(i | {_HASH: digest(i)}, ensure_ascii=False) for i in (*self.history(), entry)]
        write_atomically(self._history, "\n".join(lines) + "\n")


def adapter_folder(settings: Settings, beginning: str) -> Path:
    """Folder of an adapter of the store, by the beginning of its key, or of the released one.

    Raises:
        ReleaseError: nothing is released.
        StoreError: there is not one adapter of that name.
    """
    if beginning:
        return open_store(settings).match(ADAPTER, beginning).path
    if not settings.fine_tuned_model.exists():
        raise ReleaseError(f"Nothing is released in {settings.workspace}. Run `ft-dagster run` first.")
    return settings.fine_tuned_model.resolve()


def _sync(folder: Path) -> None:
    """Have the folder's files on disk before anything points to them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
