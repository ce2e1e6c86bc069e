"""Lineage of adapters: the chapters they were made from, how two of them differ, and which were trained on a text.

Everything is read from manifests and from the store, and nothing from Dagster, so that lineage is available wherever
an adapter's folder and the store are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ft_dagster.config.recipe_file import recipe_of_adapter
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.chapter import natural_key
from ft_dagster.corpus.sections import KIND as SECTIONS
from ft_dagster.corpus.sections import stored_chapters, stored_shards
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.corpus.snapshot import snapshot_files
from ft_dagster.dataset.dataset import all_documents
from ft_dagster.dataset.held_out.record import Pinned, section_unit, write_pinned
from ft_dagster.errors import UserError
from ft_dagster.evaluation.eval_sets import SHIPPED
from ft_dagster.evaluation.request import KIND as EVALUATION
from ft_dagster.evaluation.request import NEW
from ft_dagster.model.manifest import Manifest, stored_manifest
from ft_dagster.release.released import Releases
from ft_dagster.store.local import Artifact, Store, write_atomically
from ft_dagster.training.request import KIND as ADAPTER


class LineageError(UserError):
    """A question about lineage cannot be answered; the message gives the reason."""


@dataclass(frozen=True)
class ChapterMade:
    """A chapter as it was used for an adapter."""

    chapter: str
    files: Mapping[str, str]
    """File -> SHA-256 of its bytes."""
    trained_on: int
    """Number of its sections and pairs that were trained on."""
    held_out: bool
    """Whether the chapter was held out for evaluation, completely or in part."""


@dataclass(frozen=True)
class Change:
    """A field that differs between two adapters."""

    field: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Difference:
    """What differs between two adapters."""

    added: tuple[str, ...]
    edited: tuple[str, ...]
    """Chapters whose files have different bytes."""
    removed: tuple[str, ...]
    recipe: tuple[Change, ...]
    """Fields of the resolved recipe that differ, as `part.field`."""
    base: tuple[Change, ...]
    made_by: tuple[Change, ...]
    """Versions of the training code and of libraries that differ."""

    @property
    def nothing(self) -> bool:
        return not any(asdict(self).values())


def chapters_of(manifest: Manifest) -> list[ChapterMade]:
    """Return the chapters of an adapter, in reading order.

    A chapter that it had learned from before, and that was no longer in the reports, has no files.
    """
    sections = Counter(item["chapter"] for item in manifest.trained_on)
    names = sorted(manifest.chapters.keys() | sections.keys(), key=natural_key)
    parts = [unit for unit in manifest.held_out if unit not in manifest.chapters]  # sections of a single chapter
    return [
        ChapterMade(
            name,
            dict(manifest.chapters.get(name, {})),
            sections[name],
            name in manifest.held_out or any(unit.startswith(section_unit(name, "")) for unit in parts),
        )
        for name in names
    ]


def never_trained_on(manifest: Manifest, dataset: Artifact) -> list[str]:
    """Return the chapters of a dataset that an adapter was not trained on, or their sections if it was on others."""
    known = {item["section"] for item in manifest.trained_on}
    new: dict[str, list[str]] = {}
    old: set[str] = set()
    for document in all_documents(dataset):
        if document.section in known:
            old.add(document.chapter)
        else:
            new.setdefault(document.chapter, []).append(document.title)
    return [
        unit
        for chapter in sorted(new, key=natural_key)
        for unit in ([section_unit(chapter, title) for title in new[chapter]] if chapter in old else [chapter])
    ]


def compare(before: Manifest, after: Manifest) -> Difference:
    """Return what changed from one adapter to another."""
    old, new = before.chapters, after.chapters
    made_by = {"code": before.code, **before.libraries}, {"code": after.code, **after.libraries}
    return Difference(
        added=_sorted(new.keys() - old.keys()),
        edited=_sorted(name for name in old.keys() & new.keys() if dict(old[name]) != dict(new[name])),
        removed=_sorted(old.keys() - new.keys()),
        recipe=_changes(flat(before.recipe), flat(after.recipe)),
        base=_changes({**before.base, "revision": before.revision}, {**after.base, "revision": after.revision}),
        made_by=_changes(*made_by),
    )


def measured(store: Store, adapter: str) -> dict[str, Any] | None:
    """Return what the last evaluation of an adapter measured: `bits_per_byte`, and `chapters` with the value of each.

    Returns None if there is no evaluation.
    """
    evaluation = store.newest(EVALUATION, adapter=adapter)
    return evaluation.about["models"][NEW] if evaluation else None


def last_evaluations(store: Store) -> dict[str, Artifact]:
    """Return adapter -> its last evaluation."""
    return {evaluation.about["adapter"]: evaluation for evaluation in reversed(list(store.all(EVALUATION)))}


def release_history(releases: Releases, store: Store) -> list[dict[str, Any]]:
    """Return every release, oldest first: `adapter`, `at`, `decision`, `reason`, `by`, `bits_per_byte` and `in_use`.

    `by` is the person who decided, or None. `in_use` is true for the last entry of the adapter to which
    `fine_tuned_model` points.
    """
    current, rows, evaluations = releases.current(), [], last_evaluations(store)
    for entry in releases.history():
        why, evaluation = entry["why"], evaluations.get(entry.get("measured", entry["adapter"]))
        rows.append(
            {
                "adapter": entry["adapter"],
                "at": entry["at"],
                **{name: why.get(name) for name in ("decision", "reason", "by")},
                "bits_per_byte": evaluation.about["models"][NEW]["bits_per_byte"] if evaluation else None,
                "in_use": False,
            }
        )
    for row in reversed(rows):
        if row["adapter"] == current:
            row["in_use"] = True
            break
    return rows


def adapters(store: Store) -> Iterator[Manifest]:
    """Yield the manifests of all adapters in the store, oldest first."""
    for artifact in reversed(list(store.all(ADAPTER))):
        yield stored_manifest(artifact)


def trained_on_chapter(store: Store, chapter: str) -> list[str]:
    """Return the keys of the adapters that were trained on a chapter with this name."""
    return [manifest.key for manifest in adapters(store) if any(i["chapter"] == chapter for i in manifest.trained_on)]


def trained_on_text(store: Store, text: str) -> dict[str, list[tuple[str, str]]]:
    """Return the adapters that were trained on a text: adapter -> (chapter, title) of each section or pair with it.

    White space and the case of letters are ignored. A text that continues beyond the end of a section is not found. A
    text that an adapter inherited from the adapter it continued from is found if the store has the sections of the
    latter.

    Args:
        store: store whose sections are searched, each group of them once, however many adapters share it.
        text: text to look for, such as a sentence.

    Raises:
        LineageError: the text is empty.
        StoreError: the sections of an adapter are no longer in the store.
    """
    wanted = _plain(text)
    if not wanted:
        raise LineageError("There is nothing to look for: the text is empty.")
    manifests = list(adapters(store))
    searched: set[tuple[str, tuple[int, ...]]] = set()
    holding: set[str] = set()
    for key in dict.fromkeys(manifest.made_from[SECTIONS] for manifest in manifests):
        shards = stored_shards(store.get(SECTIONS, key))
        store.fetch_blobs(shard.lines for shard in shards)
        for shard in shards:
            if (shard.lines, shard.duplicates) in searched:
                continue
            searched.add((shard.lines, shard.duplicates))
            for chapter in stored_chapters(store, shard):
                holding |= {s.hash for s in chapter.sections if wanted in _plain(s.markdown)}
                pairs = ((pair.hash, _plain(f"{pair.original}\n\n{pair.improved}")) for pair in chapter.pairs)
                holding |= {name for name, both in pairs if wanted in both}
    found = {m.key: [(i["chapter"], i["title"]) for i in m.trained_on if i["section"] in holding] for m in manifests}
    return {key: places for key, places in found.items() if places}


def restore(store: Store, manifest: Manifest, folder: Path) -> list[str]:
    """Write a workspace that makes an adapter again: the report files byte for byte, the recipe, and what was held out.

    Args:
        store: store that has the report files.
        manifest: manifest of the adapter.
        folder: folder of the new workspace, which must be empty or not exist.

    Returns:
        The report files that were written, relative to the folder.

    Raises:
        LineageError: the folder is not empty, or the adapter continued from another one.
        StoreError: a file is missing or damaged.
    """
    if folder.exists() and any(folder.iterdir()):
        raise LineageError(f"{folder} is not empty. Name a new folder.")
    if manifest.started_from:
        raise LineageError(
            f"{manifest.key[:12]} continued from the adapter {manifest.started_from[:12]}, so its last reports alone "
            "do not make it again. Restore and train that adapter first, then replace its reports with these."
        )
    if manifest.refit_of:  # it follows from the adapter that was measured, and what that one was measured on
        measured_one = stored_manifest(store.get(ADAPTER, manifest.refit_of))
        recipe = {**measured_one.recipe, "release": {**measured_one.recipe["release"], "refit": True}}
        return restore(store, replace(measured_one, recipe=recipe), folder)
    written = []
    files = list(snapshot_files(store.get(SNAPSHOT, manifest.made_from[SNAPSHOT])))
    store.fetch_blobs(file.sha256 for file in files)
    for file in files:
        write_atomically(folder / file.path, store.get_blob(file.sha256))
        written.append(file.path)
    elsewhere = {name: SHIPPED for name in ("general", "chat") if manifest.recipe["evaluation"].get(name)}
    # The eval sets do not affect the adapter, and a folder of them may not exist here.
    recipe = {**manifest.recipe, "evaluation": {**manifest.recipe["evaluation"], **elsewhere}}
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    kept = frozenset(manifest.held_out)
    share = recipe_of_adapter(manifest.recipe).tokens.held_out
    write_pinned(Settings(workspace=folder).pins, Pinned(kept, frozenset(manifest.chapters.keys()) - kept, share))
    return written


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=natural_key))


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested plain data to one level, with the names joined by dots.

    >>> flat({"lora": {"rank": 8}, "name": "house"})
    {'lora.rank': 8, 'name': 'house'}
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Change, ...]:
    names = sorted(before.keys() | after.keys())
    return tuple(
        Change(name, before.get(name), after.get(name))
        for name in names
        if json.dumps(before.get(name)) != json.dumps(after.get(name))
    )
