"""A training resumes where another machine was cut off, and gives the same bytes."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trainings import start, wait_until, weights

from ft_dagster.store.bucket import Bucket
from ft_dagster.training.attempts import mark_complete
from ft_dagster.training.checkpoints import last_complete
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.shared_checkpoints import SharedCheckpoints
from ft_dagster.training.train import train

FILES = {"weights": b"1", "optimizer": b"2", "sub/state": b"3"}


def test_a_killed_training_resumes_on_another_machine_with_the_same_bytes(
    request_for: Callable[..., TrainingRequest], s3_url: str
) -> None:
    def on(machine: str) -> TrainingRequest:
        return replace(request_for(machine, training={"epochs": 4}), checkpoints=f"{s3_url}/attempts/key")

    bucket = Bucket(f"{s3_url}/attempts/key")
    killed = start(on("here"))
    wait_until(lambda: any(name.endswith("/complete") for name in bucket.list("")), killed)
    killed.kill()
    killed.communicate()
    assert train(on("there"), lambda _: None)["resumed_from"] > 0
    assert len({name.partition("/")[0] for name in bucket.list("")}) == 1, "older ones are removed"
    undisturbed = request_for("undisturbed", training={"epochs": 4})
    assert train(undisturbed, lambda _: None)["resumed_from"] == 0
    assert weights(on("there")) == weights(undisturbed)


def checkpoint(attempt: Path, step: int, whole: bool = True) -> Path:
    folder = attempt / f"checkpoint-{step}"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data + b"%d" % step)
    if whole:
        mark_complete(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_checkpoint_is_fetched_if_newer_and_older_ones_are_removed(s3_url: str, tmp_path: Path) -> None:
    shared = SharedCheckpoints(s3_url)
    for step in (8, 10):
        shared.put(checkpoint(tmp_path / "here", step))
    assert {name.partition("/")[0] for name in shared.bucket.list("")} == {"checkpoint-10"}
    there = tmp_path / "there"
    checkpoint(there, 9)
    checkpoint(there, 10, whole=False)
    shared.fetch(there)
    assert last_complete(there) == there / "checkpoint-10"
    assert content(there / "checkpoint-10") == content(tmp_path / "here" / "checkpoint-10")
    checkpoint(there, 12)
    before = content(there)
    shared.fetch(there)
    assert content(there) == before
    shared.forget()
    assert shared.bucket.list("") == {}
    shared.fetch(tmp_path / "empty")
    assert last_complete(tmp_path / "empty") is None


def test_a_slower_machine_removes_no_newer_checkpoint(s3_url: str, tmp_path: Path) -> None:
    fast, slow = SharedCheckpoints(s3_url), SharedCheckpoints(s3_url)
    fast.put(checkpoint(tmp_path / "fast", 10))
    slow.put(checkpoint(tmp_path / "slow", 6))
    shared = SharedCheckpoints(s3_url)
    shared.fetch(tmp_path / "third")
    assert last_complete(tmp_path / "third") == tmp_path / "third" / "checkpoint-10"


@pytest.mark.parametrize("damage", ["a file", "the list of files", "a file is missing"])
def test_a_damaged_or_incomplete_checkpoint_is_not_used(
    s3_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    shared = SharedCheckpoints(s3_url)
    shared.put(checkpoint(tmp_path / "here", 10))
    names = list(shared.bucket.list(""))
    whole = next(name for name in names if name.endswith("complete"))
    spoilt = whole if damage == "the list of files" else next(name for name in names if name != whole)
    if damage == "a file is missing":
        shared.bucket.remove([spoilt])
    else:
        shared.bucket.write(spoilt, (shared.bucket.read(spoilt) or b"").replace(b"1", b"7"))
    shared.fetch(tmp_path / "there")
    assert last_complete(tmp_path / "there") is None
    assert spoilt in caplog.text and "An older checkpoint, or none, is used" in caplog.text
    shared.bucket.remove([whole])
    caplog.clear()
    shared.fetch(tmp_path / "there")
    assert not caplog.text, "an upload that was cut off is not whole"


def test_an_unreachable_bucket_stops_no_training(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    shared = SharedCheckpoints(s3_url)
    with caplog.at_level(logging.WARNING):
        shared.put(checkpoint(tmp_path, 10))
        shared.fetch(tmp_path)
        shared.forget()
    assert [record.getMessage().partition(".")[0] for record in caplog.records] == [
        "The checkpoint of step 10 is on this machine only",
        "Checkpoints of other machines cannot be listed",
        "Shared checkpoints that are no longer needed could not be removed",
    ]
