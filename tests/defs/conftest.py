"""Instances of Dagster for tests: empty, or of a workspace that is up to date."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from graphs import NO_TELEMETRY, TOKEN, run
from reports import chapter_text, recipe_for


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a `workspace` that is up to date and the `home` of the instance that brought it there."""
    folder = tmp_path_factory.mktemp("finished")
    chapters = folder / "workspace" / "chapter_markdowns"
    chapters.mkdir(parents=True)
    for number in range(1, 7):
        (chapters / f"chapter_{number}.md").write_text(chapter_text(number), "utf-8")
    (folder / "workspace" / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(tiny_base)), "utf-8")
    (folder / "workspace" / ".env").write_text(f"HUGGINGFACE_TOKEN={TOKEN}\n")
    (folder / "home").mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.local_temp(str(folder / "home"), overrides=NO_TELEMETRY) as instance,
    ):
        patch.delenv("HUGGINGFACE_TOKEN", raising=False)
        patch.setenv("FT_WORKSPACE", str(folder / "workspace"))
        patch.setenv("FT_RECIPE", "recipe.yaml")
        patch.setenv("FT_CACHE", str(folder / "cache"))
        assert run(instance).success
    return folder


@pytest.fixture
def up_to_date(finished: Path, workspace: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The instance of a workspace that is up to date: copies of both, to be changed."""
    shutil.copytree(finished / "workspace", workspace, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(finished / "home", tmp_path / "home")
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=NO_TELEMETRY) as instance:
        yield instance
