"""Flipped bits and truncated checkpoints are detected before use and named, and following the message fixes them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from commands import COMMAND, ft_dagster, on_one_line, work_in_copy
from dagster_dev import wait_until
from graphs import run
from processes import end_inheriting

from ft_dagster.corpus.sections import stored_shards
from ft_dagster.corpus.snapshot import shard_files, snapshot_shards
from ft_dagster.dataset.dataset import dataset_shards
from ft_dagster.defs.clean import KINDS
from ft_dagster.defs.runs.state import failure_message
from ft_dagster.store.local import Artifact, Store

USED_BY = {
    "raw_chapters": ("sections",),
    "sections": ("tokenized_dataset",),
    "tokenized_dataset": ("lora_adapter", "adapter_evaluation"),  # one reads the training text, one the held-out text
    "lora_adapter": ("adapter_evaluation",),
    "adapter_evaluation": ("released_adapter",),
}
NOT_READ_THERE = {
    # A stage cannot be misled by what it does not read; the stage that reads it checks it.
    "sections": {"unreadable.json", "findings.json"},
}


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def blobs_of(artifact: Artifact) -> Iterator[str]:
    match artifact.kind:
        case "raw_chapters":
            for shard in snapshot_shards(artifact):
                yield shard.blob
                yield from (file.sha256 for file in shard_files(artifact.store, shard))
        case "sections":
            for stored in stored_shards(artifact):
                yield from (stored.lines, stored.figures)
        case "tokenized_dataset":
            for rows in dataset_shards(artifact):
                yield from (rows.documents, *rows.rows.values())  # the figures are read only for the next dataset


def files_of(store: Store, kind: str) -> list[Path]:
    """Return every file of the only artifact of a kind, with its manifest and the blobs that it names."""
    artifact = store.get(kind, store.keys(kind)[0])
    folder = [path for path in sorted(artifact.path.rglob("*")) if path.is_file()]
    return folder + [store.blob_path(name) for name in dict.fromkeys(blobs_of(artifact))]


def contents(store: Store) -> dict[str, Any]:
    """Return the keys and bytes that must be the same again; of an evaluation only its measurements, not its time."""
    found = {}
    for stage in KINDS:
        for key in store.keys(stage.name):
            made = store.get(stage.name, key)
            found[stage.name] = (key, made.about["models"] if "models" in made.about else dict(made.files))
    return found


def said_by(instance: dg.DagsterInstance, *assets: str) -> str:
    """Return why a run of these stages failed; nothing if it did not."""
    result = run(instance, *assets)
    return "" if result.success else " ".join(map(failure_message, result.get_step_failure_events()))


@pytest.mark.parametrize("kind", USED_BY)
def test_each_flipped_bit_is_detected_and_named_before_the_damaged_file_is_used(
    up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path, kind: str
) -> None:
    store = Store(workspace / ".ft" / "store")
    before = contents(store)
    not_read = set()
    for path in files_of(store, kind):
        whole = path.read_bytes()
        for stage in USED_BY[kind]:
            shutil.rmtree(store.root / stage, ignore_errors=True)  # so that it is made and not found
            flip(path)
            said = said_by(up_to_date, stage)
            path.write_bytes(whole)
            if said:
                assert str(path) in said and "is damaged" in said and "Delete" in said, said
                break
            assert contents(store).get(stage) == before.get(stage)
        else:
            not_read.add(path.name)
    assert not_read <= NOT_READ_THERE.get(kind, set())


@pytest.mark.parametrize("kind", USED_BY)
def test_following_the_message_about_damage_restores_an_artifact_with_the_same_bytes(
    up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    store = Store(workspace / ".ft" / "store")
    before = contents(store)
    flip(store.get(kind, store.keys(kind)[0]).path / "artifact.json")
    refused = ft_dagster("run")
    found = re.search(r"is damaged.*? Delete (\S+) and run", on_one_line(refused.stderr))
    assert refused.returncode == 1 and found, refused.stderr
    shutil.rmtree(found[1])
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert contents(store) == before


def test_reports_and_rows_that_were_damaged_are_made_again_from_the_reports(
    up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    store = Store(workspace / ".ft" / "store")
    before = contents(store)
    (chapter, *_) = (path for path in files_of(store, "raw_chapters") if "blobs" in path.parts)
    flip(chapter)
    with (workspace / "chapter_markdowns" / "chapter_2.md").open("a") as file:
        file.write("\nThe ferry went only once.\n")
    refused = ft_dagster("run")
    said = on_one_line(refused.stderr)
    assert refused.returncode == 1 and f"{chapter} is damaged. Delete it and the folders" in said, refused.stderr
    chapter.unlink()
    for name in ("raw_chapters", "sections", "tokenized_dataset"):
        shutil.rmtree(store.root / name)
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert contents(store) != before


def test_a_truncated_checkpoint_is_named_and_training_resumes_from_the_one_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("stopped", "undisturbed"):
        workspace = work_in_copy(finished, tmp_path / name, monkeypatch)
        path = workspace / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["training"] |= {"epochs": 8, "save_every": 2}
        path.write_text(yaml.safe_dump(recipe))
        if name == "stopped":
            before, last = two_checkpoints_of_a_killed_run(workspace)
            (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:1000])
        done = ft_dagster("run")
        assert done.returncode == 0, done.stderr
        adapter = Store(workspace / ".ft" / "store").newest("lora_adapter")
        assert adapter
        made.append((adapter.key, adapter.files["adapter_model.safetensors"]))
        if name == "stopped":
            assert f"{last / 'optimizer.pt'} is damaged or missing" in on_one_line(done.stderr)
            assert adapter.about["resumed_from"] == int(before.name.rpartition("-")[2])
    assert made[0] == made[1]


def two_checkpoints_of_a_killed_run(workspace: Path) -> list[Path]:
    """Run, kill everything once two checkpoints are complete, and return the last two, the older one first."""

    def whole() -> list[Path]:
        found = [path.parent for path in (workspace / ".ft" / "attempts").glob("*/*/checkpoint-*/complete")]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    with subprocess.Popen([*COMMAND, "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        try:
            wait_until(lambda: len(whole()) >= 2, "two checkpoints are whole", pause=0.1)
        finally:
            end_inheriting("FT_WORKSPACE", str(workspace))
    return whole()[-2:]
