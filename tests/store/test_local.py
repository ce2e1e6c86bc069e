"""The store keeps artifacts completely or not at all, and detects and names every damaged byte."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.store.hashing import canonical_json, digest, file_digest
from ft_dagster.store.local import MANIFEST, Artifact, Store, StoreError, write_atomically

FILES = {"weights.bin": b"\x00\x01\x02", "sub/config.json": b"{}", "sub/artifact.json": b"not ours"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (FILES if files is None else files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def flip_bit(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def kept_files(store: Store) -> set[str]:
    """Return the names of all files in the folder of blobs, including hidden ones."""
    return {path.name for path in (store.root / "blobs").rglob("*") if path.is_file()}


def commit_at_once(root: Path, number: int) -> str:
    """Commit as one of several processes that finish the same work."""
    store = Store(root)
    with store.staging() as folder:
        fill(folder, {"weights.bin": bytes([number]) * 1000})
        return str(store.commit("kind", "key", folder, {"number": number}).about["number"])


# Texts and hashes


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_json_of_a_value_does_not_depend_on_the_order_of_its_keys(value: dict[str, object]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)
    assert json.loads(canonical_json(value).decode("utf-8", "surrogatepass")) == value


def test_a_digest_is_the_sha256_of_bytes_or_of_the_json() -> None:
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest({"b": 1, "a": "é"}) == digest('{"a":"é","b":1}'.encode())


def test_a_lone_surrogate_has_a_digest() -> None:
    assert digest("\ud800") == digest(b'"\xed\xa0\x80"')


# Writing


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"old")
    write_atomically(path, "neu: é")
    assert path.read_text("utf-8") == "neu: é"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_committed_files_can_be_read_by_anyone_who_may_read_new_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("1")
    (tmp_path / "folder" / "weights").chmod(0o600)  # as safetensors leaves it
    taken = Store(tmp_path / "store").commit("kind", "key", tmp_path / "folder", {})
    (tmp_path / "plain").write_text("")
    assert (taken.path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert set(taken.files) == {"weights"}


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Blobs


def test_a_blob_is_read_back_by_its_hash(store: Store) -> None:
    name = store.put_blobs([b"# Chapter 1\r\n"])[0]
    assert name == digest(b"# Chapter 1\r\n")
    assert store.get_blob(name) == b"# Chapter 1\r\n"


def test_an_existing_blob_is_not_written_again(store: Store) -> None:
    path = store.root / "blobs" / digest(b"text")[:2] / digest(b"text")
    store.put_blobs([b"text"])
    written = path.stat().st_ino
    store.put_blobs([b"text"])
    assert path.stat().st_ino == written


def test_one_flipped_bit_in_a_blob_is_detected_and_named(store: Store) -> None:
    name = store.put_blobs([b"text"])[0]
    flip_bit(store.root / "blobs" / name[:2] / name)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        store.get_blob(name)


def test_a_missing_blob_is_detected_and_named(store: Store) -> None:
    with pytest.raises(StoreError, match=r"abc123 is missing from the store\. Delete the folders raw_chapters, sect"):
        store.get_blob("abc123")


def test_many_blobs_are_kept_once_each_and_named_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_dagster.store.local._BATCH_BLOBS", 3)
    store.put_blobs([b"2"])
    written = store.blob_path(digest(b"2")).stat().st_ino
    contents = [b"%d" % (number % 8) for number in range(16)]
    assert store.put_blobs(iter(contents)) == [digest(data) for data in contents]
    assert store.put_blobs([]) == []
    assert kept_files(store) == store.blobs() == {digest(data) for data in contents}
    assert [store.get_blob(digest(data)) for data in contents] == contents
    assert store.blob_path(digest(b"2")).stat().st_ino == written


def test_blobs_get_their_names_only_once_their_bytes_are_on_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    monkeypatch.setattr("ft_dagster.store.local._BATCH_BYTES", 3)
    monkeypatch.setattr(os, "sync", lambda: seen.append(store.blobs()))
    store.put_blobs([b"ab", b"cd", b"ef"])
    assert seen == [set(), {digest(b"ab"), digest(b"cd")}]
    assert store.blobs() == {digest(b"ab"), digest(b"cd"), digest(b"ef")}


def test_if_making_blobs_fails_halfway_no_blob_is_half_written(store: Store) -> None:
    def contents() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store.put_blobs(contents())
    assert kept_files(store) <= {digest(b"one")}
    assert all(store.get_blob(name) for name in store.blobs())


def test_blobs_that_cannot_be_written_leave_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fail_in_the_middle(path: Path, data: bytes) -> int:
        write(path, data[:1])
        if data == b"three":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_in_the_middle)
    with pytest.raises(OSError, match="No space left"):
        store.put_blobs([b"one", b"two", b"three", b"four"])
    assert kept_files(store) == store.blobs()
    assert {digest(b"three"), digest(b"four")}.isdisjoint(store.blobs())
    monkeypatch.undo()
    store.put_blobs([b"one", b"two", b"three"])
    assert [store.get_blob(digest(data)) for data in (b"one", b"two", b"three")] == [b"one", b"two", b"three"]


def test_a_store_that_does_not_exist_has_no_blobs(store: Store) -> None:
    assert store.blobs() == set()
    assert not store.has_blob("abc123")


def test_a_blob_that_is_being_written_is_not_listed(store: Store) -> None:
    name = store.put_blobs([b"text"])[0]
    store.blob_path(name).with_name(f".{name}.half").write_bytes(b"te")
    assert store.blobs() == {name}


# Artifacts


def test_an_artifact_is_read_back_with_its_metadata(store: Store) -> None:
    with store.staging() as folder:
        taken = store.commit("kind", "key", fill(folder), {"pair": (1, 2), 3: "é"})
    assert store.get("kind", "key") == taken
    assert taken.path == store.root / "kind" / "key"
    assert taken.about == {"pair": [1, 2], "3": "é"}
    assert taken.files == {name: digest(data) for name, data in FILES.items()}
    assert file_digest(taken.path / "weights.bin") == taken.files["weights.bin"]


def test_an_artifact_can_be_opened_by_its_folder(store: Store) -> None:
    with store.staging() as folder:
        taken = store.commit("kind", "key", fill(folder), {"number": 1})
    opened = Artifact.open(taken.path)
    assert (opened.path, opened.about, opened.files) == (taken.path, taken.about, taken.files)
    assert opened.store.root == store.root
    with pytest.raises(StoreError, match=r"kind/other is not an artifact: it has no artifact\.json"):
        Artifact.open(store.root / "kind" / "other")


def test_json_of_an_artifact_is_checked_when_it_is_read(store: Store) -> None:
    with store.staging() as folder:
        taken = store.commit("kind", "key", fill(folder, {"list.json": b"[1, 2]"}), {})
    assert taken.read_json("list.json") == [1, 2]
    flip_bit(taken.path / "list.json", 1)
    with pytest.raises(StoreError, match=r"kind/key/list\.json is damaged: its hash is not the one recorded\. Delete "):
        taken.read_json("list.json")


def test_of_artifacts_with_equal_metadata_the_newest_is_the_one_committed_last(store: Store) -> None:
    assert store.newest("kind") is None
    for at, (key, color) in enumerate([("b", "red"), ("a", "red"), ("c", "blue")], start=1):
        with store.staging() as folder:
            taken = store.commit("kind", key, fill(folder), {"color": color})
        os.utime(taken.path, ns=(at, at))  # clocks of file systems are too coarse for a test
    assert [found.key for color in ("red", "blue") if (found := store.newest("kind", color=color))] == ["a", "c"]
    assert (newest := store.newest("kind")) and newest.key == "c"
    assert store.newest("kind", color="green") is None


def test_an_artifact_that_was_not_committed_is_not_found(store: Store) -> None:
    assert store.find("kind", "key") is None
    with pytest.raises(StoreError, match=r"has no kind key\. Materialize kind again"):
        store.get("kind", "key")


def test_the_first_artifact_under_a_key_is_kept(store: Store) -> None:
    for number in (1, 2):
        with store.staging() as folder:
            artifact = store.commit("kind", "key", fill(folder, {"a": bytes([number])}), {"number": number})
            assert not folder.exists()
    assert artifact.about == {"number": 1}
    assert (store.get("kind", "key").path / "a").read_bytes() == b"\x01"


def test_if_processes_finish_the_same_work_at_once_one_result_is_kept(store: Store) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as pool:
        numbers = set(pool.map(commit_at_once, [store.root] * 12, range(12)))
    kept = store.get("kind", "key").about["number"]
    assert numbers == {str(kept)}
    assert list((store.root / "staging").iterdir()) == []


def test_if_threads_commit_the_same_key_at_once_one_result_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)
    rename = Path.rename

    def rename_together(folder: Path, target: Path) -> Path:
        together.wait()  # all have seen that no artifact exists yet
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", rename_together)
    with ThreadPoolExecutor(4) as pool:
        numbers = set(pool.map(commit_at_once, [store.root] * 4, range(4)))
    assert numbers == {str(store.get("kind", "key").about["number"])}


def test_a_folder_left_over_from_a_killed_process_is_ignored(store: Store) -> None:
    with store.staging() as folder:
        fill(folder)
        write_atomically(folder / MANIFEST, "{}")
        shutil.copytree(folder, store.root / "staging" / "killed" / "artifact")
    assert store.find("kind", "key") is None
    with store.staging() as folder:
        assert list(folder.iterdir()) == []


def test_a_folder_without_a_manifest_is_ignored_and_reported_when_in_the_way(store: Store) -> None:
    fill(store.root / "kind" / "key")
    assert store.find("kind", "key") is None
    with store.staging() as folder, pytest.raises(StoreError, match="kind/key already exists, but has no manifest"):
        store.commit("kind", "key", fill(folder), {})


def test_a_folder_on_another_disk_is_committed_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_between_disks(folder: Path, target: Path) -> Path:
        if store.root not in folder.parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", refuse_between_disks)
    attempt = fill(tmp_path / "attempt")
    store.commit("kind", "key", attempt, {"step": 4})
    assert store.get("kind", "key").about == {"step": 4}
    assert set(store.get("kind", "key").files) == set(FILES)
    assert not attempt.exists()


def test_a_disk_that_cannot_be_written_is_reported_as_such(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with store.staging() as folder, pytest.raises(OSError, match="Read-only file system"):
        store.commit("kind", "key", fill(folder), {})


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_bit_in_a_file_of_an_artifact_is_detected_and_named(store: Store, name: str) -> None:
    with store.staging() as folder:
        store.commit("kind", "key", fill(folder), {})
    flip_bit(store.root / "kind" / "key" / name)
    with pytest.raises(StoreError, match=rf"kind/key/{name} is damaged: its hash is not the one recorded\. Delete "):
        store.get("kind", "key")


def test_a_missing_file_of_an_artifact_is_detected_and_named(store: Store) -> None:
    with store.staging() as folder:
        store.commit("kind", "key", fill(folder), {})
    (store.root / "kind" / "key" / "weights.bin").unlink()
    with pytest.raises(StoreError, match=r"kind/key/weights\.bin is missing from the store\. Delete "):
        store.get("kind", "key")


def test_any_flipped_bit_in_a_manifest_is_detected(store: Store) -> None:
    with store.staging() as folder:
        taken = store.commit("kind", "key", fill(folder, {"a": b"a"}), {"version": "1f", "gain": 0.25})
    path = taken.path / MANIFEST
    for at in range(path.stat().st_size):
        flip_bit(path, at)
        with pytest.raises(StoreError, match=r"kind/key/artifact\.json is damaged"):
            store.find("kind", "key")
        flip_bit(path, at)
    assert store.get("kind", "key") == taken


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"about": {}, "files": {}}', "\ufeff{}"])
def test_an_invalid_manifest_is_detected_and_named(store: Store, content: str) -> None:
    with store.staging() as folder:
        store.commit("kind", "key", fill(folder), {})
    (store.root / "kind" / "key" / MANIFEST).write_text(content, "utf-8")
    with pytest.raises(StoreError, match=r"kind/key/artifact\.json is damaged"):
        store.find("kind", "key")
    with store.staging() as folder, pytest.raises(StoreError, match=r"kind/key/artifact\.json is damaged"):
        store.commit("kind", "key", fill(folder), {})


def test_an_artifact_that_was_moved_to_another_key_is_detected(store: Store) -> None:
    with store.staging() as folder:
        store.commit("kind", "key", fill(folder), {})
    (store.root / "kind" / "key").rename(store.root / "kind" / "other")
    with pytest.raises(StoreError, match=r"kind/other/artifact\.json is damaged"):
        store.get("kind", "other")
