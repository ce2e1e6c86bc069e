"""What `clean` keeps of the store, and what it removes."""

import json
import os
import shutil
from pathlib import Path

import dagster as dg
import pytest
from graphs import run

from ft_dagster.corpus.sections import all_chapters
from ft_dagster.dataset.dataset import load_rows
from ft_dagster.defs.clean import find_removable
from ft_dagster.defs.runs.history import forget_runs, old_runs
from ft_dagster.defs.stages import all_materializations, stale_stages
from ft_dagster.defs.workspace import Workspace
from ft_dagster.store.local import Artifact, Store, StoreError


def edit(workspace: Path, text: str) -> None:
    """Replace the last sentence of a chapter that is trained on."""
    manifest = json.loads((workspace / "fine_tuned_model" / "manifest.json").read_text())
    chapters = sorted((workspace / "chapter_markdowns").iterdir())
    chapter = next(path for path in chapters if path.stem not in manifest["held_out"])
    chapter.write_text(chapter.read_text().split("\nEdited.")[0] + f"\nEdited. {text}\n")


def adapters(workspace: Path) -> dict[str, Artifact]:
    folder = workspace / ".ft" / "store" / "lora_adapter"
    return {path.name: Artifact.open(path) for path in folder.iterdir()}


def test_right_after_a_run_there_is_nothing_to_remove(up_to_date: dg.DagsterInstance) -> None:
    assert find_removable(up_to_date, Workspace()).paths == {}


def test_only_what_no_kept_adapter_was_made_from_is_removed(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_KEEP_ADAPTERS", "1")
    first = set(adapters(workspace))
    edit(workspace, "Second.")
    assert run(up_to_date, "raw_chapters", "sections", "tokenized_dataset").success  # a dataset without an adapter
    edit(workspace, "Third.")
    assert run(up_to_date).success
    kept = adapters(workspace)
    found = find_removable(up_to_date, Workspace())
    counts = {name: len(paths) for name, paths in found.paths.items()}
    assert counts.pop("files of chapters, sections and datasets") > 0
    assert counts == {"tokenized_dataset": 1, "sections": 1, "raw_chapters": 1}
    assert first < set(found.kept_adapters) == set(kept), "the first one was released"
    found.remove(up_to_date)
    assert find_removable(up_to_date, Workspace()).paths == {}
    assert stale_stages(up_to_date, Workspace()) == []
    store = Store(workspace / ".ft" / "store")
    for adapter in adapters(workspace).values():
        made_from = adapter.read_json("manifest.json")["made_from"]
        assert len(load_rows(store.get("tokenized_dataset", made_from["tokenized_dataset"]), "train"))
        sections = store.get("sections", made_from["sections"])
        assert sum(len(chapter.sections) for chapter in all_chapters(sections)) == sections.about["sections"]


def test_released_adapters_may_be_removed_but_never_the_one_in_use(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_KEEP_ADAPTERS", "1")
    monkeypatch.setenv("FT_KEEP_RELEASED", "false")
    (first,) = adapters(workspace)
    released = (workspace / "fine_tuned_model").resolve()
    attempt = workspace / ".ft" / "attempts" / "recent"
    attempt.mkdir(parents=True)
    other = workspace / ".ft" / "store" / "lora_adapter" / "other"
    made = Artifact.open(workspace / ".ft" / "store" / "lora_adapter" / first)
    copy = workspace / "copy"
    shutil.copytree(made.path, copy)
    made.store.commit("lora_adapter", "other", copy, made.about)
    found = find_removable(up_to_date, Workspace())
    assert other.name in found.kept_adapters, "it was made last"
    assert first in found.kept_adapters, "it is released, and what the asset holds"
    assert released.exists() and "trainings given up" not in found.paths


def test_old_runs_beyond_the_limit_are_removed_unless_they_made_current_assets(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [run(up_to_date, "raw_chapters").run_id for _ in range(4)]
    before = all_materializations(up_to_date)
    assert not find_removable(up_to_date, Workspace())
    monkeypatch.setenv("FT_KEEP_RUNS", "2")
    found = find_removable(up_to_date, Workspace())
    assert list(found.runs) == later[:2], "the first one made the adapter"
    assert all(found.runs.values()) and found.sizes()["old runs"][1] > 0
    found.remove(up_to_date)
    assert not any(file.exists() for files in found.runs.values() for file in files)
    assert {record.run_id for record in up_to_date.get_runs()} >= set(later[2:])
    assert not {record.run_id for record in up_to_date.get_runs()} & set(later[:2])
    assert not find_removable(up_to_date, Workspace())
    assert all_materializations(up_to_date) == before
    assert stale_stages(up_to_date, Workspace()) == []


def test_runs_since_the_last_success_are_kept_because_failures_are_counted_in_them(
    instance: dg.DagsterInstance,
) -> None:
    def ended(status: dg.DagsterRunStatus) -> str:
        return instance.add_run(dg.DagsterRun(job_name="bring_up_to_date", status=status)).run_id

    under_way = ended(dg.DagsterRunStatus.STARTED)
    first = [ended(dg.DagsterRunStatus.SUCCESS)]
    failed = [ended(dg.DagsterRunStatus.FAILURE) for _ in range(3)]
    assert old_runs(instance, keep=1) == []
    ended(dg.DagsterRunStatus.SUCCESS)
    assert old_runs(instance, keep=1) == first + failed
    assert old_runs(instance, keep=3) == first + failed[:1]
    forget_runs(instance, first + failed)
    assert old_runs(instance, keep=1) == [] and instance.get_run_by_id(under_way)


def test_a_store_that_a_run_uses_is_not_cleaned(workspace: Path) -> None:
    store = Store(workspace / ".ft" / "store")
    with store.in_use(), pytest.raises(StoreError, match="in use by a run"), store.cleaning(patience=0.2):
        pass
    with store.cleaning():
        pass


def test_half_written_files_of_a_killed_process_are_removed(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    store = workspace / ".ft" / "store"
    (store / "staging" / "left" / "artifact").mkdir(parents=True)
    (store / "blobs" / "00").mkdir(exist_ok=True)
    (store / "blobs" / "00" / ".half.1234").write_bytes(b"half")
    found = find_removable(up_to_date, Workspace())
    assert found.sizes() == {"unfinished artifacts": (2, 4)}
    found.remove(up_to_date)
    assert find_removable(up_to_date, Workspace()).paths == {}


def test_a_training_that_was_interrupted_long_ago_is_kept_while_its_dataset_is(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    (dataset,) = (workspace / ".ft" / "store" / "tokenized_dataset").iterdir()
    for name, of, result in (("wanted", dataset.name, False), ("gone", "other", False), ("finished", "other", True)):
        attempts = workspace / ".ft" / "attempts" / name
        attempt = attempts / "first"
        attempt.mkdir(parents=True)
        (attempt / "request.json").write_text(json.dumps({"dataset": str(dataset.with_name(of))}))
        if result:
            (attempt / "result.json").write_text("{}")
        for path in (*attempt.iterdir(), attempt, attempts):
            os.utime(path, (0, 0))
    found = find_removable(up_to_date, Workspace())
    assert [path.name for path in found.paths["trainings given up"]] == ["gone"]
