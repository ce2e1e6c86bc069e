"""A base model from a hub is fetched once, and files that differ from the hub's hashes are fetched again."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import COMMAND, on_one_line, work_in
from hub import COMMIT, MODEL, TOKEN, Hub, serving_hub
from reports import prose_of, recipe_for

WEIGHTS = "fine_tuned_model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[Hub]:
    with serving_hub(tiny_base) as hub:
        yield hub


@pytest.fixture(scope="module")
def trained(
    finished: Path, hub: Hub, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, bytes]]:
    """Return a folder with a workspace trained on the hub's model, and the weights that an edit gives there."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(finished / "workspace" / "chapter_markdowns", folder / "workspace" / "chapter_markdowns")
    recipe = recipe_for(tiny_base) | {"base": {"source": "hub", "model": MODEL, "revision": COMMIT}}
    (folder / "workspace" / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    (folder / "workspace" / ".env").write_text(f"HUGGINGFACE_TOKEN={TOKEN}\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        done = run_in(folder, hub, patch)
        assert done.returncode == 0, done.stderr
        assert hub.fetched.count("model.safetensors") == 1
        undisturbed = folder.with_name("undisturbed")
        shutil.copytree(folder, undisturbed, symlinks=True)
        edit(undisturbed)
        done = run_in(undisturbed, hub, patch)
        assert done.returncode == 0, done.stderr
        assert hub.fetched.count("model.safetensors") == 1
        yield folder, (undisturbed / "workspace" / WEIGHTS).read_bytes()


@pytest.fixture
def edited(trained: tuple[Path, bytes], tmp_path: Path) -> Path:
    """Return a copy of that folder with an edit that is not trained on yet."""
    folder = shutil.copytree(trained[0], tmp_path / "copy", symlinks=True)
    edit(folder)
    return folder


def edit(folder: Path) -> None:
    with (folder / "workspace" / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.writelines(prose_of(number) for number in range(20, 26))


def run_in(folder: Path, hub: Hub, patch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    work_in(folder, patch)
    patch.setenv("HF_ENDPOINT", hub.address)
    return subprocess.run([*COMMAND, "run"], capture_output=True, text=True, check=False)


def in_cache(folder: Path, name: str) -> Path:
    """Return the path of the bytes of one of the model's files."""
    (link,) = (folder / "cache" / "hub").glob(f"models--*/snapshots/{COMMIT}/{name}")
    return link.resolve()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_or_missing_base_files_are_fetched_again_before_training(
    edited: Path, trained: tuple[Path, bytes], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(hub.fetched)
    for name in ("model.safetensors", "config.json"):
        flip(in_cache(edited, name))
    in_cache(edited, "tokenizer.json").unlink()
    done = run_in(edited, hub, monkeypatch)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.fetched[before:]) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in ("model.safetensors", "config.json"):
        assert f"{name} is damaged" in on_one_line(done.stderr)
    assert (edited / "workspace" / WEIGHTS).read_bytes() == trained[1]


def test_without_access_to_the_hub_a_damaged_base_is_named_and_nothing_is_trained(
    edited: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = in_cache(edited, "model.safetensors")
    flip(weights)
    released = (edited / "workspace" / WEIGHTS).read_bytes()
    with serving_hub(hub.folder) as gone:
        pass
    done = run_in(edited, gone, monkeypatch)
    said = on_one_line(done.stderr)
    assert done.returncode == 1
    assert f"model.safetensors is damaged, and {MODEL} at {COMMIT} cannot be downloaded" in said, said
    assert TOKEN not in done.stdout + done.stderr
    assert (edited / "workspace" / WEIGHTS).read_bytes() == released
