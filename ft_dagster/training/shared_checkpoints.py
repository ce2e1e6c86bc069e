"""Checkpoints of one training in a bucket, so that it goes on on another machine. Imports no torch.

Of each there is `checkpoint-N/complete`, written last, which names its files and their hashes; a file's name is its
hash, so that two machines that train the same never mix. The newest is kept.
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
_REPAIR = "An older checkpoint, or none, is used in its place."


class SharedCheckpoints:
    """The checkpoints of one training below a URL.

    Training does not depend on them: what goes wrong here is a warning.
    """

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)

    def put(self, checkpoint: Path) -> None:
        """Keep a whole checkpoint, in place of older ones."""
        folder = checkpoint.name
        files = checkpoint_files(checkpoint)
        try:
            self.bucket.put({f"{folder}/{files[name]}": checkpoint / name for name in files})
            self.bucket.write(f"{folder}/{COMPLETE}", completion(files))
            self._remove([name for name in self.bucket.list("") if step_of(name) < step_of(folder)])
        except StoreError as error:
            log.warning("The checkpoint of step %s is on this machine only. %s", step_of(folder), error)

    def bring(self, attempt: Path) -> None:
        """Bring the newest whole checkpoint into an attempt's folder, if it is newer than what is there."""
        last = last_checkpoint(attempt)
        here = step_of(last) if last else 0
        try:
            whole = [name for name in self.bucket.list("") if name.endswith(f"/{COMPLETE}")]
        except StoreError as error:
            log.warning("Checkpoints of other machines cannot be looked at. %s", error)
            return
        for name in sorted(whole, key=step_of, reverse=True):
            if step_of(name) <= here:
                return
            try:
                self._bring(name, attempt)
                return
            except StoreError as error:
                log.warning("%s", error)

    def forget(self) -> None:
        """Remove all of them: the training has ended."""
        try:
            self._remove(list(self.bucket.list("")))
        except StoreError as error:
            log.warning("Checkpoints of a training that has ended are still there. %s", error)

    def _bring(self, name: str, attempt: Path) -> None:
        folder = name.partition("/")[0]
        content = self.bucket.read(name) or b""
        files = completed_files(content)
        if files is None:
            raise StoreError(f"{self.bucket.url}/{name} is damaged: its hash is not the one recorded. {_REPAIR}")
        incoming = attempt / f".{folder}"
        shutil.rmtree(incoming, ignore_errors=True)
        for file in files:
            (incoming / file).parent.mkdir(parents=True, exist_ok=True)
        wanted = {incoming / file: f"{folder}/{sha256}" for file, sha256 in files.items()}
        self.bucket.fetch(wanted, {f"{folder}/{sha256}": sha256 for sha256 in files.values()}, _REPAIR)
        (incoming / COMPLETE).write_bytes(content)
        shutil.rmtree(attempt / folder, ignore_errors=True)  # half written, or it would be newer
        incoming.rename(attempt / folder)
        log.info("Brought %s of another machine", folder)

    def _remove(self, names: list[str]) -> None:
        """First what says that a checkpoint is whole."""
        self.bucket.remove(name for name in names if name.endswith(f"/{COMPLETE}"))
        self.bucket.remove(name for name in names if not name.endswith(f"/{COMPLETE}"))
