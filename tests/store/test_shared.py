"""A store in a bucket: another machine finds what one machine stored completely, and nothing incomplete."""

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from buckets import SECRET_KEY, Server, Wire, set_environment, wire_to
from fsspec.registry import _registry

from ft_dagster.config.settings import Settings, SettingsError, load_settings
from ft_dagster.store.bucket import Bucket
from ft_dagster.store.dry_run import DryRunStore
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import MANIFEST, Artifact, Store, StoreError
from ft_dagster.store.shared import SharedStore, open_store

FILES = {"weights.bin": b"\x00\x01\x02", "sub/config.json": b"{}", "list.json": b"[1, 2]"}


@pytest.fixture
def here(s3_url: str, tmp_path: Path) -> SharedStore:
    """The store as one machine sees it."""
    return SharedStore(s3_url, tmp_path / "here")


@pytest.fixture
def there(s3_url: str, tmp_path: Path) -> SharedStore:
    """The same store as another machine sees it."""
    return SharedStore(s3_url, tmp_path / "there")


def made(store: Store, key: str = "key", files: dict[str, bytes] = FILES, **about: object) -> Artifact:
    with store.staging() as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return store.commit("kind", key, folder, about)


def objects(store: SharedStore) -> set[str]:
    return set(store.bucket.list(""))


def spoil(store: SharedStore, name: str, data: bytes) -> None:
    store.bucket.write(name, data)


def blob(data: bytes) -> str:
    return f"blobs/{digest(data)[:2]}/{digest(data)}"


# What another machine sees


def test_an_artifact_made_on_one_machine_is_the_same_on_another(here: SharedStore, there: SharedStore) -> None:
    taken = made(here, number=1, name="é")
    found = there.get("kind", "key")
    assert (found.about, found.files) == (taken.about, taken.files) == ({"number": 1, "name": "é"}, found.files)
    for folder in (taken.path, found.path):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert files == {*FILES, MANIFEST}
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert (taken.path / MANIFEST).read_bytes() == (found.path / MANIFEST).read_bytes()


def test_the_metadata_of_an_artifact_is_read_without_fetching_its_files(here: SharedStore, there: SharedStore) -> None:
    made(here, number=1)
    found = there.find("kind", "key")
    assert found and found.about == {"number": 1}
    assert found.read_json("list.json") == [1, 2]
    assert not found.path.exists()
    assert not there.blob_path(digest(FILES["weights.bin"])).exists()


def test_the_folder_on_a_machine_is_a_store_that_needs_no_bucket(
    here: SharedStore, there: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = here.put_blobs([b"one", b"two"])
    made(here, number=1)
    found = there.get("kind", "key")
    there.fetch_blobs(names)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    opened = Artifact.open(found.path)
    opened.verify()
    assert opened.about == {"number": 1}
    assert [opened.store.get_blob(name) for name in names] == [b"one", b"two"]


def test_blobs_are_found_by_their_hash_on_another_machine(here: SharedStore, there: SharedStore) -> None:
    contents = [b"%d" % (number % 50) for number in range(60)]
    names = here.put_blobs(iter(contents))
    assert names == [digest(data) for data in contents]
    assert there.blobs() == set(names)
    assert there.has_blob(names[0]) and not there.has_blob(digest(b"other"))
    there.fetch_blobs([*names, names[0]])
    assert all(there.blob_path(name).exists() for name in names)
    assert [there.get_blob(name) for name in names] == contents


def test_the_newest_artifact_is_the_one_that_the_bucket_received_last(
    here: SharedStore, there: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, color in (("b", "red"), ("a", "red"), ("c", "blue")):
        made(here, key, color=color)
    moments = {f"kind/{key}/{MANIFEST}": moment for key, moment in (("b", 1.0), ("a", 2.0), ("c", 3.0))}
    listing = Bucket.list

    def with_moments(bucket: Bucket, folder: str) -> dict[str, object]:
        from dataclasses import replace

        return {name: replace(entry, at=moments[name]) for name, entry in listing(bucket, folder).items()}

    monkeypatch.setattr(Bucket, "list", with_moments)  # the server's clock is too coarse for a test
    assert [artifact.key for artifact in there.all("kind")] == ["c", "a", "b"]
    assert (newest := there.newest("kind", color="red")) and newest.key == "a"
    assert there.newest("kind", color="green") is None
    assert there.match("kind", "b").key == "b"
    with pytest.raises(StoreError, match="There is not exactly one kind whose key begins with 'x' in s3://"):
        there.match("kind", "x")


def test_what_was_removed_from_the_bucket_is_gone_on_every_machine(here: SharedStore, there: SharedStore) -> None:
    made(here)
    there.get("kind", "key")
    there.bucket.remove([f"kind/key/{MANIFEST}"])
    for store in (here, there):
        assert store.find("kind", "key") is None
        assert list(store.all("kind")) == []
        with pytest.raises(StoreError, match=r"The store s3://.* has no kind key\. Materialize kind again"):
            store.get("kind", "key")
    made(there, files={"a": b"other"}, number=2)
    again = here.get("kind", "key")  # over the copy of the earlier content
    assert again.about == {"number": 2} and (again.path / "a").read_bytes() == b"other"
    assert not (again.path / "weights.bin").exists()


def test_a_plan_reads_from_the_bucket_and_writes_to_its_own_folder(
    here: SharedStore, there: SharedStore, tmp_path: Path
) -> None:
    (name,) = here.put_blobs([b"text"])
    made(here, number=1)
    before = objects(here)
    overlay = DryRunStore(there, tmp_path / "overlay")
    assert overlay.has_blob(name) and overlay.get_blob(name) == b"text"
    assert overlay.put_blobs([b"text", b"new"]) == [name, digest(b"new")]
    assert overlay.get_blob(digest(b"new")) == b"new"
    found = overlay.find("kind", "key")
    assert found and found.read_json("list.json") == [1, 2]
    assert made(overlay, "other", number=2).read_json("list.json") == [1, 2]
    assert objects(here) == before


# Completely or not at all


def test_an_artifact_without_a_manifest_does_not_exist(here: SharedStore, there: SharedStore) -> None:
    made(here)
    names = objects(here)
    assert len([name for name in names if name.startswith("blobs/")]) == len(FILES)
    there.bucket.remove([name for name in names if name.endswith(MANIFEST)])
    assert there.find("kind", "key") is None
    with pytest.raises(StoreError):
        there.match("kind", "key")


@pytest.fixture
def wire(s3_server: Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Return the proxy through which this machine reaches the server."""
    with wire_to(s3_server) as wire:
        set_environment(monkeypatch, s3_server, through=wire.address)
        yield wire


@pytest.mark.parametrize("after", [0, 3_000, 150_000, 250_000])
def test_an_interrupted_upload_leaves_nothing_readable_and_the_next_one_completes(
    wire: Wire, s3_server: Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    files = {f"part-{number}": bytes([number]) * 100_000 for number in range(3)}
    blobs = [b"%d" % number * 20_000 for number in range(3)]
    store = SharedStore(s3_url, tmp_path / "here")
    wire.cut_after(after)
    with pytest.raises(StoreError, match=r"The store s3://.* cannot be used"):
        store.put_blobs(blobs)
        made(store, files=files)
    assert wire.cuts
    with monkeypatch.context() as patch:
        set_environment(patch, s3_server)
        other = SharedStore(s3_url, tmp_path / "there")
        assert other.find("kind", "key") is None and list(other.all("kind")) == []
        for name in other.blobs():
            assert digest(other.get_blob(name)) == name, "what is there is whole"
    wire.restore()
    names = store.put_blobs(blobs)
    made(store, files=files)
    with monkeypatch.context() as patch:
        set_environment(patch, s3_server)
        other = SharedStore(s3_url, tmp_path / "there")
        found = other.get("kind", "key")
        assert {name: (found.path / name).read_bytes() for name in files} == files
        assert [other.get_blob(name) for name in names] == blobs


def test_if_two_machines_finish_the_same_work_at_once_one_result_is_kept_complete(
    here: SharedStore, there: SharedStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2)
    write = Bucket.write_first

    def at_once(bucket: Bucket, name: str, data: bytes) -> bytes:
        together.wait()  # both have uploaded all of their files
        return write(bucket, name, data)

    monkeypatch.setattr(Bucket, "write_first", at_once)

    def make(store: SharedStore, number: int) -> Artifact:
        return made(store, files={"a": bytes([number]), "b": bytes([number]) * 9}, number=number)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(make, (here, there), (1, 2)))
    (winner,) = {result.about["number"] for result in results}
    for store in (here, there, SharedStore(s3_url, tmp_path / "third")):
        kept = store.get("kind", "key")
        assert kept.about == {"number": winner}
        assert ((kept.path / "a").read_bytes(), (kept.path / "b").read_bytes()) == (
            bytes([winner]),
            bytes([winner] * 9),
        )


def test_the_first_artifact_under_a_key_is_kept(here: SharedStore, there: SharedStore) -> None:
    made(here, number=1)
    assert made(there, number=2).about == {"number": 1}


# Damage


@pytest.mark.parametrize("damage", [b"\x00\x01\x03", b"\x00\x01", b""])
def test_a_damaged_or_truncated_file_is_named_with_what_to_do(
    here: SharedStore, there: SharedStore, damage: bytes
) -> None:
    made(here)
    spoil(here, blob(FILES["weights.bin"]), damage)
    with pytest.raises(
        StoreError, match=r"s3://.*/blobs/.* is damaged: .* Delete it and s3://.*/kind/key/artifact\.json"
    ):
        there.get("kind", "key")
    assert not (there.root / "kind").exists() or not any((there.root / "kind").iterdir())
    there.bucket.remove([blob(FILES["weights.bin"]), f"kind/key/{MANIFEST}"])  # as the message says
    assert made(there).files
    SharedStore(here.url, here.root.with_name("third")).get("kind", "key")


def test_a_missing_file_is_detected_and_named(here: SharedStore, there: SharedStore) -> None:
    made(here)
    here.bucket.remove([blob(FILES["weights.bin"])])
    with pytest.raises(StoreError, match=rf"{blob(FILES['weights.bin'])} is missing from the store\. Delete"):
        there.get("kind", "key")


@pytest.mark.parametrize("damage", [b"tex", b"Text"])
def test_a_damaged_blob_is_detected_and_named(here: SharedStore, there: SharedStore, damage: bytes) -> None:
    (name,) = here.put_blobs([b"text"])
    spoil(here, blob(b"text"), damage)
    with pytest.raises(StoreError, match=rf"s3://.*{name} is damaged: .* Delete it and the folders raw_chapters"):
        there.get_blob(name)
    with pytest.raises(StoreError, match="is missing from the store"):
        there.get_blob(digest(b"never there"))


def test_a_damaged_manifest_is_detected_and_named(here: SharedStore, there: SharedStore) -> None:
    made(here, number=1)
    text = json.dumps(json.loads(here.bucket.read(f"kind/key/{MANIFEST}") or b"") | {"about": {"number": 2}})
    spoil(here, f"kind/key/{MANIFEST}", text.encode())
    for read in (lambda: there.find("kind", "key"), lambda: list(there.all("kind"))):
        with pytest.raises(StoreError, match=r"s3://.*/kind/key/artifact\.json is damaged"):
            read()


def test_a_damaged_copy_is_fetched_again(here: SharedStore, there: SharedStore) -> None:
    (name,) = here.put_blobs([b"text"])
    made(here)
    found = there.get("kind", "key")
    for path, data in ((there.blob_path(name), b"Text"), (found.path / "list.json", b"[9]")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert there.get_blob(name) == b"text"
    assert found.read_json("list.json") == [1, 2]
    shutil.rmtree(found.path)
    assert (there.get("kind", "key").path / "list.json").read_bytes() == b"[1, 2]"


# Settings


def test_a_url_opens_a_bucket_and_anything_else_a_folder(s3_url: str, tmp_path: Path) -> None:
    settings = Settings(workspace=tmp_path, cache=tmp_path / "cache", store=f"{s3_url}/")
    store = open_store(settings)
    assert (str(store), store.url) == (s3_url, s3_url)
    assert store.root.is_relative_to(tmp_path / "cache" / "stores")
    other = open_store(settings.model_copy(update={"workspace": tmp_path / "other"}))
    assert other.root == store.root, "all workspaces of a machine share the copy"
    folder = open_store(settings.model_copy(update={"store": "kept"}))
    assert (str(folder), folder.url) == (str(tmp_path / "kept"), None)


@pytest.mark.parametrize("url", [f"s3://AKIA:{SECRET_KEY.replace('/', '%2F')}@bucket/store", "s3://b/p?secret=canary"])
def test_a_url_with_credentials_is_refused_without_repeating_them(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("FT_STORE", url)
    with pytest.raises(SettingsError, match=r"FT_STORE: .*a URL holds no credentials") as error:
        load_settings()
    assert "canary" not in str(error.value)


def test_a_url_without_a_bucket_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_STORE", "s3:///store")
    with pytest.raises(SettingsError, match="names no bucket"):
        load_settings()


def test_a_missing_package_or_unknown_scheme_for_a_bucket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # as in a process that has not looked for it yet
    with pytest.raises(StoreError, match=r"the package for that is missing .* `pip install \.\[s3\]`"):
        SharedStore("s3://bucket/store", tmp_path)
    with pytest.raises(StoreError, match="FT_STORE is nowhere://bucket/store, which cannot be used"):
        SharedStore("nowhere://bucket/store", tmp_path)


def test_a_missing_bucket_is_named_and_nothing_is_kept(s3_url: str, tmp_path: Path) -> None:
    store = SharedStore("s3://no-such-bucket/store", tmp_path)
    assert store.find("kind", "key") is None
    with pytest.raises(StoreError, match=r"The store s3://no-such-bucket/store cannot be used: .*bucket"):
        store.put_blobs([b"text"])
    assert Store(tmp_path).blobs() == set()
