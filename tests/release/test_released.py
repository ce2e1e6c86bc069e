"""`./fine_tuned_model/` is one complete adapter at every instant."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from ft_dagster.model.manifest import Manifest
from ft_dagster.release.released import ReleaseError, Releases
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Artifact, Store, StoreError

_BOUND = {"name": "base", "weights": "", "tokenizer": "", "template": ""}


class Workspace:
    """A workspace with a store and adapters whose files each contain the name of their adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / ".ft" / "store")
        self.link = folder / "fine_tuned_model"
        self.releases = Releases(self.link, folder / ".ft")

    def adapter(self, key: str) -> Artifact:
        with self.store.staging() as folder:
            (folder / "adapter_config.json").write_text(json.dumps({"adapter": key}))
            (folder / "adapter_model.safetensors").write_bytes(key.encode() * 2000)
            (folder / "templates").mkdir()
            (folder / "templates" / "chat.jinja").write_text(key)
            files = {name: file_digest(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
            Manifest(key, _BOUND, {}, "1", {}, files=files).write(folder)
            return self.store.commit("lora_adapter", key, folder, {})

    def released(self) -> tuple[str | None, str]:
        """Return (what is recorded as released, what a reader finds)."""
        return self.releases.current(), json.loads((self.link / "adapter_config.json").read_bytes())["adapter"]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_before_the_first_release_there_is_none(here: Workspace) -> None:
    assert (here.releases.current(), here.releases.current_folder(), here.releases.history()) == (None, None, [])


def test_a_released_adapter_is_where_the_link_points(here: Workspace) -> None:
    assert here.releases.release(here.adapter("one"), {"decision": "release"}) is None
    assert here.released() == ("one", "one")
    assert here.releases.current_folder() == here.folder / ".ft" / "released" / "one"
    assert here.link.readlink() == Path(".ft/released/one")
    assert here.names() == [".ft", "fine_tuned_model"]


def test_a_workspace_that_is_moved_keeps_its_release(here: Workspace, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    Workspace(old).releases.release(Workspace(old).adapter("one"), {})
    old.rename(new)
    assert Workspace(new).released() == ("one", "one")


def test_the_history_says_what_was_released_when_and_why(here: Workspace) -> None:
    for key in ("one", "two", "one"):
        here.releases.release(here.adapter(key), {"reason": f"{key} is better,\u2028 é\x85\nand so on"})
    history = here.releases.history()
    assert [(entry["adapter"], entry["why"]["reason"]) for entry in history] == [
        (key, f"{key} is better,\u2028 é\x85\nand so on") for key in ("one", "two", "one")
    ]
    assert all(entry["at"].endswith("+00:00") for entry in history)
    assert here.released() == ("one", "one")


def test_a_history_with_a_flipped_bit_is_refused_by_its_line_or_read_unchanged(here: Workspace) -> None:
    for key in ("one", "two"):
        here.releases.release(here.adapter(key), {"decision": "release", "reason": "né", "gain": 0.35044398704789764})
    path = here.releases.folder / "history.jsonl"
    whole, entries = path.read_bytes(), here.releases.history()
    refused = 0
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = here.releases.history()
            assert [entry | before for entry, before in zip(found, entries, strict=True)] == found, bytes(data)
        except ReleaseError as error:
            refused += 1
            assert f"of {path} is damaged" in str(error) and "delete the line" in str(error)
    assert refused > 4 * len(whole)


def test_releasing_the_released_adapter_again_changes_nothing(here: Workspace) -> None:
    adapter = here.adapter("one")
    here.releases.release(adapter, {})
    before = (here.link.lstat(), here.releases.history())
    assert here.releases.release(adapter, {"reason": "again"}) is None
    assert (here.link.lstat(), here.releases.history()) == before


def test_a_reader_finds_a_complete_adapter_during_every_switch(here: Workspace) -> None:
    adapters = [here.adapter(key) for key in ("one", "two")]
    here.releases.release(adapters[0], {})
    seen: list[tuple[str, bytes]] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            folder = here.link.resolve(strict=True)
            config = json.loads((folder / "adapter_config.json").read_bytes())
            seen.append((config["adapter"], (folder / "adapter_model.safetensors").read_bytes()))

    def read_and_keep_error() -> None:
        try:
            read()
        except Exception as error:
            errors.append(error)

    errors: list[Exception] = []
    reader = threading.Thread(target=read_and_keep_error)
    reader.start()
    for number in range(1, 201):
        here.releases.release(adapters[number % 2], {})
    ended.set()
    reader.join()
    assert errors == []
    assert set(seen) == {(key, key.encode() * 2000) for key in ("one", "two")}
    assert len(here.releases.history()) == 201


def test_a_damaged_adapter_is_refused_before_the_switch(here: Workspace) -> None:
    here.releases.release(here.adapter("one"), {})
    damaged = here.adapter("two")
    (damaged.path / "adapter_model.safetensors").write_bytes(b"twp" * 2000)
    with pytest.raises(StoreError, match=r"two/adapter_model\.safetensors is damaged"):
        here.releases.release(damaged, {})
    assert here.released() == ("one", "one")
    assert not (here.releases.folder / "two").exists()
    assert [entry["adapter"] for entry in here.releases.history()] == ["one"]


def test_an_earlier_release_that_has_been_damaged_is_refused(here: Workspace) -> None:
    for key in ("one", "two"):
        here.releases.release(here.adapter(key), {})
    (here.releases.folder / "one" / "adapter_config.json").unlink()
    with pytest.raises(StoreError, match=r"released/one/adapter_config\.json is missing"):
        here.releases.release(here.adapter("one"), {})
    assert here.released() == ("two", "two")


def test_an_incomplete_copy_of_a_killed_process_is_made_again(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "adapter_config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", killed)
        here.releases.release(here.adapter("one"), {})
    assert here.releases.current() is None
    here.releases.release(here.adapter("one"), {})
    assert here.released() == ("one", "one")
    assert sorted(path.name for path in here.releases.folder.iterdir()) == [".lock", "history.jsonl", "one"]


def test_a_folder_in_the_way_is_moved_aside_and_kept(here: Workspace) -> None:
    for number in (1, 2):
        shutil.rmtree(here.folder / ".ft" / "released", ignore_errors=True)
        here.link.unlink(missing_ok=True)
        here.link.mkdir()
        (here.link / "original.bin").write_bytes(bytes([number]))
        assert here.releases.current() is None
        aside = here.releases.release(here.adapter("one"), {})
        assert aside == here.folder / f"fine_tuned_model.before-{number}"
        assert (aside / "original.bin").read_bytes() == bytes([number])
        assert here.released() == ("one", "one")


def test_a_link_to_elsewhere_is_moved_aside_and_kept(here: Workspace) -> None:
    elsewhere = here.folder / "elsewhere" / "one"
    elsewhere.mkdir(parents=True)
    here.link.symlink_to("elsewhere/one")
    assert here.releases.current() is None
    aside = here.releases.release(here.adapter("one"), {})
    assert aside is not None
    assert aside.readlink() == Path("elsewhere/one")
    assert here.released() == ("one", "one")


def test_a_broken_link_kept_aside_is_not_overwritten(here: Workspace) -> None:
    (here.folder / "fine_tuned_model.before-1").symlink_to("unmounted/adapter")
    here.link.mkdir()
    assert here.releases.release(here.adapter("one"), {}) == here.folder / "fine_tuned_model.before-2"
    assert (here.folder / "fine_tuned_model.before-1").readlink() == Path("unmounted/adapter")


def test_a_link_of_ours_whose_folder_was_deleted_is_replaced(here: Workspace) -> None:
    adapter = here.adapter("one")
    here.releases.release(adapter, {})
    shutil.rmtree(here.releases.folder / "one")
    assert here.releases.current() is None
    assert here.releases.release(adapter, {}) is None
    assert here.released() == ("one", "one")


def test_without_symbolic_links_nothing_is_touched(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    here.link.mkdir()
    (here.link / "original.bin").write_bytes(b"kept")

    def refuse(link: Path, target: str, target_is_directory: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(ReleaseError, match=r"not support symbolic links \(Operation not permitted\).*another file sys"):
        here.releases.release(here.adapter("one"), {})
    assert (here.link / "original.bin").read_bytes() == b"kept"
    assert here.names() == [".ft", "fine_tuned_model"]
    assert here.releases.history() == []


def test_rolling_back_restores_an_earlier_adapter_in_one_step(here: Workspace) -> None:
    for key in ("one", "two", "three"):
        here.releases.release(here.adapter(key), {"decision": "release"})
    assert here.releases.before() == "two"
    here.releases.roll_back("two", {"decision": "rolled back", "reason": "it was better"})
    assert here.released() == ("two", "two")
    assert here.releases.before() == "one", "not the one that it went back from"
    assert [entry["adapter"] for entry in here.releases.history()] == ["one", "two", "three", "two"]
    assert here.releases.history()[-1]["why"]["reason"] == "it was better"


def test_rolling_back_twice_goes_further_back_and_not_to_what_was_just_rolled_back(here: Workspace) -> None:
    for key in ("one", "two", "three"):
        here.releases.release(here.adapter(key), {"decision": "release"})
    for expected in ("two", "one"):
        assert here.releases.before() == expected
        here.releases.roll_back(expected, {"decision": "rolled back", "by": "somebody"})
    with pytest.raises(ReleaseError, match="No other adapter"):
        here.releases.before()


def test_an_adapter_never_in_use_missing_or_damaged_cannot_be_restored(here: Workspace) -> None:
    with pytest.raises(ReleaseError, match="No other adapter"):
        here.releases.before()
    for key in ("one", "two"):
        here.releases.release(here.adapter(key), {})
    with pytest.raises(ReleaseError, match="three was never in use"):
        here.releases.roll_back("three", {})
    (here.releases.folder / "one" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ReleaseError, match="is not the file that was saved"):
        here.releases.roll_back("one", {})
    shutil.rmtree(here.releases.folder / "one")
    with pytest.raises(ReleaseError, match="removed"):
        here.releases.roll_back("one", {})
    assert here.released() == ("two", "two") and len(here.releases.history()) == 2


def test_adapters_that_a_user_promoted_or_rolled_back_are_known(here: Workspace) -> None:
    assert not here.releases.chosen_by_hand()
    for key in ("one", "two"):
        here.releases.release(here.adapter(key), {"decision": "release"})
    assert not here.releases.chosen_by_hand() and here.releases.proven() == {"one", "two"}
    here.releases.roll_back("one", {"decision": "rolled back", "by": "somebody"})
    assert here.releases.chosen_by_hand()
    assert here.releases.proven() == {"one"}, "an adapter that a person took out of use must prove itself again"
    here.releases.release(here.adapter("three"), {"decision": "release"})
    assert not here.releases.chosen_by_hand() and here.releases.proven() == {"one", "three"}
    assert here.releases.withdrawn() == {"two"}
    here.releases.roll_back("two", {"decision": "promoted by hand", "by": "somebody"})
    assert here.releases.withdrawn() == {"three"}
    with pytest.raises(ReleaseError, match="two is in use already"):
        here.releases.roll_back("two", {"by": "somebody"})
