"""The main job with the real embedded base model, as a user runs it; and the UI that shows it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ft_dagster
from dagster_ui import graphql
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ft_dagster.recipe import load_recipe
from ft_dagster.settings import Settings

PROJECT = Path(__file__).parents[2]
PROMPT = "A low-rank update of the weights"
CHAPTERS = ("chapter_1.md", "chapter_6.md", "chapter_7.md")


@dataclass(frozen=True)
class Job:
    """A run of the main job that has ended."""

    workspace: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, new_history: Callable[[], dict[str, str]]) -> Iterator[Job]:
    """`ft-dagster run` on three chapters with the real base, in an environment that stays for the module."""
    workspace = tmp_path_factory.mktemp("job") / "workspace"
    (workspace / "chapter_markdowns").mkdir(parents=True)
    for name in CHAPTERS:
        shutil.copy(PROJECT / "ft_dagster" / "examples" / "chapter_markdowns" / name, workspace / "chapter_markdowns")
    recipe = load_recipe("smollm2-135m").model_dump(mode="json")
    recipe["training"] |= {"rows_per_step": 2, "epochs": 1}
    recipe["evaluation"] |= {"sample_tokens": 8}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("FT_WORKSPACE", str(workspace))
        patch.setenv("FT_RECIPE", "recipe.yaml")
        patch.setenv("FT_CACHE", str(Settings().cache))  # the converted base is kept between test runs
        for name, value in new_history().items():
            patch.setenv(name, value)
        done = ft_dagster("run", "--json")
        assert done.returncode == 0, done.stderr
        yield Job(workspace, json.loads(done.stdout))


def test_a_report_becomes_a_released_adapter_of_the_real_base_that_is_better_than_it(job: Job) -> None:
    assert job.summary["held_out"] == ["chapter_6"]
    assert job.summary["used_bytes"] == job.summary["usable_bytes"]
    assert job.summary["bits_per_byte"]["new"] < job.summary["bits_per_byte"]["base"] - 0.01
    model, tokenizer = released(job)
    output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith(PROMPT)


def test_as_gguf_it_says_what_base_and_adapter_say(job: Job, tmp_path: Path) -> None:
    done = ft_dagster("release", "export", str(tmp_path / "merged"), "--gguf", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    file = Path(json.loads(done.stdout)["gguf"])
    model, tokenizer = released(job)
    from_gguf = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        wanted, found = model(**inputs).logits.log_softmax(-1), from_gguf(**inputs).logits.log_softmax(-1)
        with model.disable_adapter():
            base = model(**inputs).logits.log_softmax(-1)
    merged_off, base_off = (float((other - wanted).abs().mean()) for other in (found, base))
    assert merged_off < base_off / 5, "what rounding to bfloat16 does is small beside what the adapter does"
    vocabulary = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert vocabulary(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]


def released(job: Job) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Adapter and base as peft and transformers alone load them, in float32."""
    folder = job.workspace / "fine_tuned_model"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)), AutoTokenizer.from_pretrained(folder)


def test_the_ui_shows_the_graph_and_sends_no_telemetry(user_interface: str, workspace: Path) -> None:
    nodes = graphql(user_interface, "{ assetNodes { assetKey { path } groupName description kinds } }")["assetNodes"]
    assert {node["assetKey"]["path"][0] for node in nodes} >= {"report_files", "lora_adapter", "released_adapter"}
    assert {node["groupName"] for node in nodes} == {"ft_dagster"}
    assert all(node["description"] and node["kinds"] for node in nodes)
    instance = graphql(user_interface, "{ instance { info } canBulkTerminate }")["instance"]["info"]
    assert yaml.safe_load(instance)["telemetry"]["enabled"] is False
