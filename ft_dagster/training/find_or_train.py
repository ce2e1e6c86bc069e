"""The adapter of a dataset: the one that was made for it before, or one that a process trains now. Imports no torch."""

import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ft_dagster.base.prepare import PreparedBase
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.corpus.snapshot import snapshot_files
from ft_dagster.dataset.dataset import KIND as DATASET
from ft_dagster.dataset.dataset import all_documents, folder_with_rows
from ft_dagster.model.manifest import read_manifest
from ft_dagster.store.local import Artifact, Store
from ft_dagster.training.attempts import attempt_in, finished_attempt
from ft_dagster.training.request import (
    KIND,
    RESULT,
    TrainingRequest,
    adapter_key,
    adapter_to_go_on_from,
    training_keys,
)
from ft_dagster.training.shared_checkpoints import SharedCheckpoints

Origin = Literal["made before", "trained", "made meanwhile"]
"""Where an adapter came from: the store, the training that was asked for, or another attempt that ended first."""
Said = TypeVar("Said")
"""What a training process reports while it works."""


@dataclass(frozen=True)
class Wanted:
    """What an adapter is wanted for."""

    dataset: Artifact
    base: PreparedBase
    recipe: Recipe
    in_use: Path | None
    """Folder of the released adapter, which the recipe may have training go on from."""


def find_or_train(
    wanted: Wanted, settings: Settings, train: Callable[[TrainingRequest], Iterator[Said]]
) -> Generator[Said, None, tuple[Artifact, Origin]]:
    """Find the adapter in the store, or have it trained and commit it.

    An attempt that was cut off, also before an upgrade that changed its key, is gone on with.

    Args:
        wanted: what the adapter is made of.
        settings: where attempts, logs and locks are.
        train: does what a request says, in a process; a request is in vain unless the process succeeds.

    Returns:
        The adapter, whose files were not checked, and where it came from.

    Raises:
        AdapterError: the manifest of the adapter in use is missing or damaged.
    """
    store = wanted.dataset.store
    keys = training_keys(wanted.dataset.about["version"], wanted.base.identity, wanted.recipe)
    if found := made_before(store, keys):
        return found, "made before"
    sections = {document.section for document in all_documents(wanted.dataset) if document.split == "train"}
    start = adapter_to_go_on_from(wanted.recipe, wanted.in_use, wanted.base, sections)
    key, attempts = adapter_key(keys[0], start), settings.state / "attempts"
    for earlier in keys[1:]:
        _go_on_with_earlier(store, attempts / adapter_key(earlier, start), attempts / key, earlier)
    if found := made_before(store, keys):
        return found, "trained"
    try:
        with attempt_in(attempts / key) as attempt:
            if not (attempt / RESULT).exists():  # a finished attempt is only waiting to be committed
                yield from train(_request(key, wanted, settings, attempt, start))
                attempt = finished_attempt(attempt.parent) or attempt
            return _commit(store, key, attempt, keys[0]), "trained"
    except Exception:
        if found := made_before(store, keys):  # folders of attempts went with the one that came first
            return found, "made meanwhile"
        raise


def made_before(store: Store, keys: Sequence[str]) -> Artifact | None:
    """The adapter that was made for the first of these training keys that has one, whatever it went on from."""
    for key in keys:
        if found := store.find(KIND, key) or store.newest(KIND, made_for=key):
            return found
    return None


def _go_on_with_earlier(store: Store, before: Path, now: Path, made_for: str) -> None:
    """What was cut off before an upgrade changed its key: an attempt that had ended goes into the store as it is, one
    that had not goes on under the new key.

    Args:
        store: takes the adapter.
        before: folder of attempts, named after the earlier key.
        now: the same for the new one.
        made_for: the earlier training key.
    """
    if finished := finished_attempt(before):
        _commit(store, before.name, finished, made_for)
    elif before.is_dir() and not now.exists():
        before.rename(now)


def _request(key: str, wanted: Wanted, settings: Settings, attempt: Path, start: Path | None) -> TrainingRequest:
    dataset = wanted.dataset
    return TrainingRequest(
        key=key,
        base=wanted.base.to_json(),
        dataset=str(folder_with_rows(dataset)),
        recipe=wanted.recipe.model_dump(mode="json"),
        attempt=str(attempt),
        logs=str(settings.logs),
        locks=str(settings.cache / "locks"),
        speeds=str(settings.speeds),
        lineage=_lineage(dataset, start),
        start=str(start) if start else None,
        cache=str(settings.cache),
        checkpoints=_checkpoints(dataset.store, key),
        threads=settings.threads,
    )


def _lineage(dataset: Artifact, start: Path | None) -> dict[str, Any]:
    """What the manifest of an adapter says of its data."""
    trained_on = [
        {"chapter": d.chapter, "title": d.title, "source": d.source, "section": d.section}
        for d in all_documents(dataset)
        if d.split == "train"
    ]
    if start:  # what it learned stays learned, also where the reports do not have it any more
        here = {item["section"] for item in trained_on}
        trained_on += [dict(item) for item in read_manifest(start).trained_on if item["section"] not in here]
    chapters: dict[str, dict[str, str]] = {}
    for file in snapshot_files(dataset.store.get(SNAPSHOT, dataset.about["made_from"][SNAPSHOT])):
        chapters.setdefault(file.chapter, {})[file.path] = file.sha256
    return {
        "dataset": dataset.about["version"],
        "made_from": dataset.about["made_from"] | {DATASET: dataset.key},
        "chapters": chapters,
        "held_out": dataset.about["held_out"],
        "trained_on": trained_on,
    }


def _commit(store: Store, key: str, attempt: Path, made_for: str) -> Artifact:
    """Put the adapter of a finished attempt into the store, and remove what the attempt needed."""
    result = json.loads((attempt / RESULT).read_bytes()) | {"made_for": made_for}
    artifact = store.take_in(KIND, key, attempt / "adapter", result)
    shutil.rmtree(attempt.parent, ignore_errors=True)
    if url := _checkpoints(store, key):
        SharedCheckpoints(url).forget()
    return artifact


def _checkpoints(store: Store, key: str) -> str | None:
    return f"{store.url}/attempts/{key}" if store.url else None
