"""Lineage: every adapter lists its chapters, and can be made again from the store."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from graphs import NO_TELEMETRY, instance_on, run
from reports import chapter_text

from ft_dagster.model.manifest import Manifest, read_manifest
from ft_dagster.release.lineage import (
    LineageError,
    adapters,
    chapters_of,
    compare,
    release_history,
    restore,
    trained_on_chapter,
    trained_on_text,
)
from ft_dagster.release.released import Releases
from ft_dagster.store.local import Store, StoreError
from ft_dagster.training.request import KIND, WEIGHTS

ONLY_NEW = "The bridge was closed for repairs on a Sunday."
CHANGED = "chapter_2"


class Workspace:
    """A workspace with two adapters; between them one chapter was edited, one added and one removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / ".ft" / "store")
        self.first, self.second = adapters(self.store)


@pytest.fixture(scope="module")
def here(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("lineage")
    shutil.copytree(finished / "workspace", folder / "workspace", symlinks=True)
    shutil.copytree(finished / "home", folder / "home")
    chapters = folder / "workspace" / "chapter_markdowns"
    (manifest,) = adapters(Store(folder / "workspace" / ".ft" / "store"))
    removed = next(name for name in manifest.chapters if name not in (*manifest.held_out, CHANGED))
    (chapters / f"{removed}.md").unlink()
    (chapters / f"{CHANGED}.md").write_text(f"{chapter_text(2)}\n{ONLY_NEW}\n", "utf-8")
    (chapters / "chapter_9.md").write_text(chapter_text(9), "utf-8")
    with instance_on(folder / "workspace", folder / "home", finished / "cache") as instance:
        assert run(instance).success
        yield Workspace(folder / "workspace")


def test_each_chapter_of_an_adapter_is_listed_with_the_hash_of_its_bytes(here: Workspace) -> None:
    chapters = chapters_of(here.second)
    assert [item.chapter for item in chapters] == sorted(here.second.chapters)
    for item in chapters:
        (file,) = item.files
        assert item.files[file] == hashlib.sha256((here.folder / file).read_bytes()).hexdigest()
        assert item.held_out == (item.chapter in here.second.held_out)
        assert bool(item.trained_on) != item.held_out


def test_differences_between_two_adapters_are_listed(here: Workspace) -> None:
    found = compare(here.first, here.second)
    (removed,) = here.first.chapters.keys() - here.second.chapters.keys()
    assert (found.added, found.edited, found.removed) == (("chapter_9",), (CHANGED,), (removed,))
    assert not (found.recipe or found.base or found.made_by)
    back = compare(here.second, here.first)
    assert (back.added, back.edited, back.removed) == ((removed,), (CHANGED,), ("chapter_9",))
    assert compare(here.first, here.first).nothing


def test_a_different_recipe_base_or_code_is_listed_field_by_field(here: Workspace) -> None:
    recipe = {**here.first.recipe, "lora": {**here.first.recipe["lora"], "rank": 64}}
    other = replace(here.first, recipe=recipe, base={**here.first.base, "weights": "other"}, code="99")
    found = compare(here.first, other)
    assert [(c.field, c.before, c.after) for c in found.recipe] == [("lora.rank", 4, 64)]
    assert [c.field for c in found.base] == ["weights"]
    assert [(c.field, c.after) for c in found.made_by] == [("code", "99")]


def test_the_adapters_that_know_a_sentence_are_found_and_only_those(here: Workspace) -> None:
    first, second = here.first.key, here.second.key
    assert trained_on_text(here.store, f"  {ONLY_NEW.upper()}\n") == {second: [(CHANGED, "BACKGROUND KNOWLEDGE")]}
    of_both = "It was item 27."
    assert {key: {name for name, _ in places} for key, places in trained_on_text(here.store, of_both).items()} == {
        first: {CHANGED},
        second: {CHANGED},
    }
    number = here.first.held_out[0].removeprefix("chapter_")
    held_out = chapter_text(int(number)).strip().split(". ")[-1]
    assert held_out.startswith("It was item") and first not in trained_on_text(here.store, held_out)
    assert trained_on_text(here.store, "a sentence that nobody wrote") == {}
    with pytest.raises(LineageError, match="nothing to look for"):
        trained_on_text(here.store, " \n")


def test_a_text_inherited_from_an_earlier_adapter_is_found(here: Workspace) -> None:
    """With `training.start: last` a manifest has sections of the adapter before that are gone from the reports."""
    (removed,) = here.first.chapters.keys() - here.second.chapters.keys()
    sentence = chapter_text(int(removed.removeprefix("chapter_"))).strip().split(". ")[-1]
    assert list(trained_on_text(here.store, sentence)) == [here.first.key]
    inherited = [item for item in here.first.trained_on if item["chapter"] == removed]
    with here.store.staging() as folder:
        replace(here.second, key="heir", trained_on=[*here.second.trained_on, *inherited]).write(folder)
        heir = here.store.commit(KIND, "heir", folder, {})
    try:
        assert list(trained_on_text(here.store, sentence)) == [here.first.key, "heir"]
    finally:
        shutil.rmtree(heir.path)


def test_a_chapter_with_held_out_sections_is_listed_as_partly_held_out(here: Workspace) -> None:
    (only,) = {"C#_basics": {"a.md": "0"}}.items()
    single = replace(here.first, chapters=dict([only]), held_out=["C#_basics#RESULTS"], trained_on=[])
    assert [(item.chapter, item.held_out) for item in chapters_of(single)] == [("C#_basics", True)]
    two = replace(single, chapters={"C": {"c.md": "1"}, "C#_basics": {"a.md": "0"}}, held_out=["C#_basics"])
    assert [(item.chapter, item.held_out) for item in chapters_of(two)] == [("C", False), ("C#_basics", True)]


def test_the_adapters_that_were_trained_on_a_chapter_are_found(here: Workspace) -> None:
    assert trained_on_chapter(here.store, "chapter_9") in ([here.second.key], [])  # it may be held out
    assert trained_on_chapter(here.store, CHANGED) == [here.first.key, here.second.key]
    assert trained_on_chapter(here.store, here.first.held_out[0]) == []


def test_the_text_of_an_adapter_is_read_back_byte_by_byte_and_makes_the_same_adapter(
    here: Workspace, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    files = restore(here.store, here.first, folder)
    assert len(files) == 6
    for file in files:
        assert (folder / file).read_bytes() == (finished / "workspace" / file).read_bytes()
    monkeypatch.setenv("FT_WORKSPACE", str(folder))
    monkeypatch.setenv("FT_RECIPE", "recipe.yaml")
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    with dg.DagsterInstance.local_temp(overrides=NO_TELEMETRY) as instance:
        assert run(instance).success
    made = read_manifest(folder / "fine_tuned_model")
    assert made.key == here.first.key
    again, before = ((root / WEIGHTS).read_bytes() for root in (folder / "fine_tuned_model", _folder(here)))
    assert again == before


def _folder(here: Workspace) -> Path:
    return here.store.root / KIND / here.first.key


def test_restoring_overwrites_nothing_and_refuses_an_adapter_continued_from_another(
    here: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(LineageError, match="not empty"):
        restore(here.store, here.first, tmp_path)
    with pytest.raises(LineageError, match="continued from the adapter 0123456789ab"):
        restore(here.store, replace(here.first, started_from="0123456789abcdef"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_named_by_the_beginning_of_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("abc1", "abc2", "abd3"):
        with store.staging() as folder:
            (folder / "weights").write_text(key)
            store.commit(KIND, key, folder, {})
    assert store.match(KIND, "abd").key == "abd3"
    assert store.match(KIND, "abc2").key == "abc2"
    for beginning, found in (("abc", r"found 2 \(abc1, abc2\)"), ("z", "found none"), ("", "found none")):
        with pytest.raises(StoreError, match=f"not exactly one lora_adapter .* begins with '{beginning}' .* {found}"):
            store.match(KIND, beginning)


def test_the_history_of_releases_has_what_was_measured(here: Workspace) -> None:
    rows = release_history(Releases(here.folder / "fine_tuned_model", here.folder / ".ft"), here.store)
    assert rows[0]["adapter"] == here.first.key
    assert sum(row["in_use"] for row in rows) == 1
    assert all(0 < row["bits_per_byte"] < 10 and row["by"] is None for row in rows)


def test_a_deleted_chapter_that_was_trained_on_before_is_still_listed(here: Workspace) -> None:
    gone = {"chapter": "chapter_0", "title": "A", "source": "chapter_0.md", "section": "0" * 64}
    manifest: Manifest = replace(here.first, trained_on=[*here.first.trained_on, gone])
    first, *_ = chapters_of(manifest)
    assert (first.chapter, first.files, first.trained_on, first.held_out) == ("chapter_0", {}, 1, False)
