"""Checkpoints of one training in a bucket, so that another machine can resume it. Imports no torch.

Each checkpoint has a `checkpoint-N/complete`, written last, which names its files and their hashes. The other files are
named by their hash, so that the files of two machines with the same training never mix. Only the newest checkpoint is
kept.
"""

import logging
import shutil
from pathlib import Path

from ft_dagster.store.bucket import Bucket
from ft_dagster.store.local import StoreError
from ft_dagster.training.attempts import (
    COMPLETE,
    checkpoint_files,
    completed_files,
    completion,
    last_checkpoint,
    step_of,
)

log = logging.getLogger(__name__)
_FALLBACK = "An older checkpoint, or none, is used instead."


class SharedCheckpoints:
    """The checkpoints of one training below a URL.

    Training does not depend on them: a failure here is logged as a warning.
    """

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)

    def put(self, checkpoint: Path) -> None:
        """Upload a complete checkpoint, and remove older ones."""
        folder = checkpoint.name
        files = checkpoint_files(checkpoint)
        try:
            self.bucket.put({f"{folder}/{files[name]}": checkpoint / name for name in files})
            self.bucket.write(f"{folder}/{COMPLETE}", completion(files))
            self._remove([name for name in self.bucket.list("") if step_of(name) < step_of(folder)])
        except StoreError as error:
            log.warning("The checkpoint of step %s is on this machine only. %s", step_of(folder), error)

    def fetch(self, attempt: Path) -> None:
        """Fetch the newest complete checkpoint into an attempt's folder, if it is newer than those in the folder."""
        last = last_checkpoint(attempt)
        here = step_of(last) if last else 0
        try:
            complete = [name for name in self.bucket.list("") if name.endswith(f"/{COMPLETE}")]
        except StoreError as error:
            log.warning("Checkpoints of other machines cannot be listed. %s", error)
            return
        for name in sorted(complete, key=step_of, reverse=True):
            if step_of(name) <= here:
                return
            try:
                self._fetch(name, attempt)
                return
            except StoreError as error:
                log.warning("%s", error)

    def forget(self) -> None:
        """Remove all checkpoints, once the training has finished or has to start over."""
        try:
            self._remove(list(self.bucket.list("")))
        except StoreError as error:
            log.warning("Shared checkpoints that are no longer needed could not be removed. %s", error)

    def _fetch(self, name: str, attempt: Path) -> None:
        folder = name.partition("/")[0]
        content = self.bucket.read(name) or b""
        files = completed_files(content)
        if files is None:
            raise StoreError(f"{self.bucket.url}/{name} is damaged: its hash is not the one recorded. {_FALLBACK}")
        incoming = attempt / f".{folder}"
        shutil.rmtree(incoming, ignore_errors=True)
        for file in files:
            (incoming / file).parent.mkdir(parents=True, exist_ok=True)
        wanted = {incoming / file: f"{folder}/{sha256}" for file, sha256 in files.items()}
        self.bucket.fetch(wanted, {f"{folder}/{sha256}": sha256 for sha256 in files.values()}, _FALLBACK)
        (incoming / COMPLETE).write_bytes(content)
        shutil.rmtree(attempt / folder, ignore_errors=True)  # incomplete or damaged, or it would not have been fetched
        incoming.rename(attempt / folder)
        log.info("Fetched %s of another machine", folder)

    def _remove(self, names: list[str]) -> None:
        """Remove objects, starting with those that mark a checkpoint as complete."""
        self.bucket.remove(name for name in names if name.endswith(f"/{COMPLETE}"))
        self.bucket.remove(name for name in names if not name.endswith(f"/{COMPLETE}"))
