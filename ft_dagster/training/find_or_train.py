"""Find the adapter of a dataset in the store, or have a process train it. Imports no torch."""

import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.corpus.snapshot import snapshot_files
from ft_dagster.dataset.dataset import KIND as DATASET
from ft_dagster.dataset.dataset import all_documents, folder_with_rows, train_version
from ft_dagster.model.manifest import read_manifest
from ft_dagster.store.local import Artifact, Store, StoreError
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
"""Where an adapter came from: the store, the requested training, or another attempt that finished first."""
Said = TypeVar("Said")
"""The type of what a training process reports while it runs."""


@dataclass(frozen=True)
class Wanted:
    """The inputs that an adapter is wanted for."""

    dataset: Artifact
    base: PreparedBase
    recipe: Recipe
    in_use: Path | None
    """Folder of the released adapter, from which training continues if the recipe says so."""
    refit_of: str = ""
    """Key of the measured adapter, if one is wanted that was trained on the held-out text, too."""


def find_or_train(
    wanted: Wanted, settings: Settings, train: Callable[[TrainingRequest], Iterator[Said]]
) -> Generator[Said, None, tuple[Artifact, Origin]]:
    """Find the adapter in the store, or have it trained and commit it.

    An interrupted attempt is resumed, even if an upgrade has changed its key since.

    Args:
        wanted: the inputs of the adapter.
        settings: the settings, which say where attempts, logs and locks are.
        train: carries out a request in a process, and yields what the process reports. It raises if the process fails.

    Returns:
        The adapter, whose files were not checked, and where it came from.

    Raises:
        AdapterError: the manifest of the adapter in use is missing or damaged.
    """
    store = wanted.dataset.store
    keys = keys_of(wanted.dataset, wanted.base.identity, wanted.recipe)
    if found := made_before(store, wanted.dataset, wanted.base.identity, wanted.recipe):
        return found, "made before"
    sections = {document.section for document in all_documents(wanted.dataset) if document.split == "train"}
    start = adapter_to_go_on_from(wanted.recipe, wanted.in_use, wanted.base, sections)
    key, attempts = adapter_key(keys[0], start), settings.state / "attempts"
    for earlier in keys[1:]:
        if found := _adopt_earlier_attempts(store, attempts / adapter_key(earlier, start), attempts / key, earlier):
            return found, "trained"
    try:
        with attempt_in(attempts / key) as attempt:
            if not (attempt / RESULT).exists():  # a finished attempt is only waiting to be committed
                for earlier in keys[1:]:
                    _adopt_shared_checkpoints(store, adapter_key(earlier, start), attempt)
                yield from train(_request(key, wanted, settings, attempt, start))
                attempt = finished_attempt(attempt.parent) or attempt
            return _commit(store, key, attempt, keys[0]), "trained"
    except Exception:
        if found := find_adapter(store, keys):  # another attempt finished first, and the folders were removed
            return found, "made meanwhile"
        raise


def why_unusable(about: Mapping[str, Any]) -> str | None:
    """Return why an adapter's weights cannot be used, with the next step; None if they can."""
    if not about["reloads"]:
        return "The saved weights are not the trained ones. Look at the disk, and run again."
    if about["largest_logit_change"] > 0:
        return None
    return (
        f"The adapter does not change the base model's output: {about['steps']} optimizer step(s) were too few, or the "
        "learning rate is too low. Raise training.epochs or training.learning_rate in the recipe."
    )


def keys_of(dataset: Artifact, base: dict[str, str], recipe: Recipe) -> list[str]:
    """Return the training keys of a dataset's adapter, see `training_keys`."""
    return training_keys(train_version(dataset), dataset.about["version"], base, recipe)


def made_before(store: Store, dataset: Artifact, base: dict[str, str], recipe: Recipe) -> Artifact | None:
    """Return an adapter in the store that is the one of this dataset, whatever adapter it started from.

    An earlier version made adapters for datasets of which only the held-out side differs; these are found, too.

    Args:
        store: the store to search, which may differ from that of the dataset in a dry run.
        dataset: the dataset.
        base: the identity of the base model.
        recipe: the resolved recipe.
    """
    keys = keys_of(dataset, base, recipe)
    if found := find_adapter(store, keys):
        return found
    if recipe.training.evaluate_every:
        return None
    version = train_version(dataset)
    alike = [known for key in store.keys(DATASET) if (known := _version_if_alike(store, key, dataset, version))]
    others = [key for other in alike for key in training_keys(version, other, base, recipe)]
    unknown = [key for key in dict.fromkeys(others) if key not in keys]
    return find_adapter(store, unknown, earlier=True) if unknown else None


def _version_if_alike(store: Store, key: str, dataset: Artifact, version: str) -> str | None:
    """Return the version of a stored dataset if its train side is that of `dataset`. Damaged ones are passed over."""
    try:
        other = store.find(DATASET, key)
        if other is None or other.about["splits"]["train"] != dataset.about["splits"]["train"]:
            return None
        return str(other.about["version"]) if train_version(other) == version else None
    except (StoreError, KeyError):
        return None


def find_adapter(store: Store, keys: Sequence[str], earlier: bool = False) -> Artifact | None:
    """Return the adapter made for the first of these training keys that has one, whatever adapter it started from.

    Adapters of earlier versions that change nothing are not used: in a training of one step the learning rate was 0.

    Args:
        store: the store to search.
        keys: training keys. All but the first are those of earlier versions.
        earlier: whether the first one is, too.
    """
    if not earlier and (found := store.find(KIND, keys[0])):
        return found
    made_for = {adapter.about.get("made_for"): adapter for adapter in reversed(list(store.all(KIND)))}
    for place, key in enumerate(keys):
        found = store.find(KIND, key) or made_for.get(key)
        if found and ((place == 0 and not earlier) or found.about.get("largest_logit_change") != 0):
            return found
    return None


def _adopt_earlier_attempts(store: Store, before: Path, now: Path, made_for: str) -> Artifact | None:
    """Adopt attempts that were interrupted before an upgrade changed their key.

    A finished attempt is committed to the store as it is, and its adapter returned; an unfinished one is moved to the
    new key.

    Args:
        store: the store that a finished adapter is committed to.
        before: the folder of attempts under the earlier key.
        now: the folder of attempts under the new key.
        made_for: the earlier training key.
    """
    if finished := finished_attempt(before):
        return _commit(store, before.name, finished, made_for)
    if before.is_dir() and not now.exists():
        before.rename(now)
    return None


def _adopt_shared_checkpoints(store: Store, before: str, attempt: Path) -> None:
    """Move checkpoints in a bucket, from before an upgrade changed their key, to an attempt's folder."""
    if url := _checkpoints(store, before):
        shared = SharedCheckpoints(url)
        shared.fetch(attempt)
        shared.forget()


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
        lineage=_lineage(dataset, start) | ({"refit_of": wanted.refit_of} if wanted.refit_of else {}),
        start=str(start) if start else None,
        cache=str(settings.cache),
        checkpoints=_checkpoints(dataset.store, key),
        threads=settings.threads,
    )


def _lineage(dataset: Artifact, start: Path | None) -> dict[str, Any]:
    """Return the part of an adapter's manifest that describes its data."""
    trained_on = [
        {"chapter": d.chapter, "title": d.title, "source": d.source, "section": d.section}
        for d in all_documents(dataset)
        if d.split == "train"
    ]
    if start:  # what it learned is kept, even if the reports no longer contain it
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
    """Commit the adapter of a finished attempt to the store, and remove all attempts and shared checkpoints."""
    result = json.loads((attempt / RESULT).read_bytes()) | {"made_for": made_for}
    artifact = store.commit(KIND, key, attempt / "adapter", result)
    shutil.rmtree(attempt.parent, ignore_errors=True)
    if url := _checkpoints(store, key):
        SharedCheckpoints(url).forget()
    return artifact


def _checkpoints(store: Store, key: str) -> str | None:
    return f"{store.url}/attempts/{key}" if store.url else None
