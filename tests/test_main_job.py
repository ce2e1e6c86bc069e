"""The main job with the real embedded base model, as a user runs it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import as_process, ft_dagster
from peft import PeftModel
from real_base import CHAPTERS, cache, quick_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PROMPT = "A low-rank update of the weights"
TAKEN = {"chapter_1.md": 7000, "chapter_6.md": 3000}
"""Chapters of the example, and how many characters of them: enough for a few steps, and for a release."""


@dataclass(frozen=True)
class Job:
    """A run of the main job that has ended."""

    workspace: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, new_history: Callable[[], dict[str, str]]) -> Iterator[Job]:
    """`ft-dagster run` on two short chapters with the real base, in an environment that stays for the module."""
    workspace = tmp_path_factory.mktemp("job") / "workspace"
    (workspace / "chapter_markdowns").mkdir(parents=True)
    for name, length in TAKEN.items():
        (workspace / "chapter_markdowns" / name).write_text((CHAPTERS / name).read_text("utf-8")[:length], "utf-8")
    recipe = quick_recipe(workspace, rows_per_device=1, rows_per_step=1)
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.delenv("OMP_NUM_THREADS", raising=False)  # as many threads as it takes by itself
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
