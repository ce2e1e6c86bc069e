"""The main job with the real embedded base model, as a user runs it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import as_process
from peft import PeftModel
from real_base import CHAPTERS, cache, quick_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "A low-rank update of the weights"
TAKEN = {"chapter_1.md": 7000, "chapter_6.md": 3000}
"""Chapters of the example and how many characters of them are used: enough for a few steps and a release."""


@dataclass(frozen=True)
class Job:
    """A finished run of the main job."""

    workspace: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, new_history: Callable[[], dict[str, str]]) -> Iterator[Job]:
    """Run `ft-dagster run` on two short chapters with the real base, in an environment kept for the module."""
    workspace = tmp_path_factory.mktemp("job") / "workspace"
    (workspace / "chapter_markdowns").mkdir(parents=True)
    for name, length in TAKEN.items():
        (workspace / "chapter_markdowns" / name).write_text((CHAPTERS / name).read_text("utf-8")[:length], "utf-8")
    recipe = quick_recipe(workspace, rows_per_device=1, rows_per_step=1)
    recipe["tokens"]["held_out"] = 0.3  # one of the two chapters
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.delenv("OMP_NUM_THREADS", raising=False)  # as many threads as it uses by default
        patch.setenv("FT_WORKSPACE", str(workspace))
        patch.setenv("FT_RECIPE", "recipe.yaml")
        patch.setenv("FT_CACHE", str(cache()))
        for name, value in new_history().items():
            patch.setenv(name, value)
        done = as_process("run", "--json")
        assert done.returncode == 0, done.stderr
        yield Job(workspace, json.loads(done.stdout))


def test_a_report_becomes_a_released_adapter_of_the_real_base_that_is_better_than_it(job: Job) -> None:
    assert job.summary["held_out"] == ["chapter_6"]
    assert job.summary["used_bytes"] == job.summary["usable_bytes"]
    assert job.summary["bits_per_byte"]["new"] < job.summary["bits_per_byte"]["base"] - 0.01
    folder = job.workspace / "fine_tuned_model"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith(PROMPT)
