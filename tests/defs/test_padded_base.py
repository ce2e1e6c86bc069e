"""A base in which packed pieces see each other is trained with each piece in a row of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from families import tiny_model
from graphs import run

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.runs.state import failure_message
from ft_dagster.defs.stages import LORA_ADAPTER
from ft_dagster.defs.workspace import Workspace
from ft_dagster.model.manifest import read_manifest


@pytest.fixture
def opt(workspace: Path, chapters: list[Path], tiny_base: Path, tiny_recipe: dict[str, Any]) -> Path:
    """Return the folder of a tiny OPT, the base of the workspace. Only the layout of a new base is unknown."""
    folder = workspace.parent / "opt"
    tiny_model("opt").save_pretrained(folder)
    for path in tiny_base.glob("*token*"):
        shutil.copy(path, folder)
    tiny_recipe["base"] = {"source": "folder", "model": str(folder), "dtype": "float32"}
    tiny_recipe["training"] |= {"epochs": 1, "learning_rate": 0.001}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return folder


def layouts() -> list[Path]:
    return sorted((load_settings().cache / "layouts").glob("*.json"))


def test_the_layout_is_tried_before_training_remembered_and_part_of_the_key(
    instance: dg.DagsterInstance, opt: Path
) -> None:
    before = set(layouts())
    result = run(instance)
    assert result.success
    (checked,) = (c for c in result.get_asset_check_evaluations() if c.check_name.startswith("pieces_in_a_row"))
    assert checked.passed and checked.metadata["layout"].value == "padded"
    (remembered,) = set(layouts()) - before
    content = json.loads(remembered.read_bytes())
    assert content["layout"] == "padded" and content["leak"] > 0.1
    (adapter,) = Workspace().store.all(LORA_ADAPTER.name)
    assert read_manifest(adapter.path).base["layout"] == "padded"
    assert {path.name.partition("-")[0] for path in load_settings().logs.iterdir() if path.is_file()} >= {"layout"}


def test_a_remembered_layout_that_is_wrong_stops_the_training_with_what_to_do(
    instance: dg.DagsterInstance, opt: Path
) -> None:
    assert run(instance, "raw_chapters", "sections", "tokenized_dataset", "lora_adapter").success
    for path in layouts():
        path.write_text('{"layout": "packed"}')
    (event,) = run(instance, "lora_adapter").get_step_failure_events()
    assert "needs padded rows here" in failure_message(event) and "Delete the folder layouts" in failure_message(event)
