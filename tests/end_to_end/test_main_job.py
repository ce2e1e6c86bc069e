"""The main job with the real embedded base model, as a user runs it; and the UI that shows it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dagster_ui import graphql
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.recipe import load_recipe
from ft_dagster.settings import Settings

PROJECT = Path(__file__).parents[2]
CHAPTERS = ("chapter_1.md", "chapter_6.md", "chapter_7.md")


def test_a_report_becomes_a_released_adapter_of_the_real_base_that_is_better_than_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CHAPTERS:
        shutil.copy(PROJECT / "examples" / "chapter_markdowns" / name, workspace / "chapter_markdowns")
    recipe = load_recipe("smollm2-135m").model_dump(mode="json")
    recipe["training"] |= {"rows_per_step": 2, "epochs": 1}
    recipe["evaluation"] |= {"sample_tokens": 8}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("FT_CACHE", str(Settings().cache))  # the converted base is kept between test runs
    done = subprocess.run(
        [sys.executable, "-m", "ft_dagster.cli", "run", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["held_out"] == ["chapter_6"]
    assert summary["used_bytes"] == summary["usable_bytes"]
    assert summary["bits_per_byte"]["new"] < summary["bits_per_byte"]["base"] - 0.01
    folder = workspace / "fine_tuned_model"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer("A low-rank update", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("A low-rank update")


def test_the_ui_shows_the_graph_and_sends_no_telemetry(user_interface: str, workspace: Path) -> None:
    nodes = graphql(user_interface, "{ assetNodes { assetKey { path } groupName description kinds } }")["assetNodes"]
    assert {node["assetKey"]["path"][0] for node in nodes} >= {"report_files", "lora_adapter", "released_adapter"}
    assert {node["groupName"] for node in nodes} == {"ft_dagster"}
    assert all(node["description"] and node["kinds"] for node in nodes)
    instance = graphql(user_interface, "{ instance { info } canBulkTerminate }")["instance"]["info"]
    assert yaml.safe_load(instance)["telemetry"]["enabled"] is False
