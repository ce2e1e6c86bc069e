"""A released adapter as a GGUF file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import ft_dagster
from peft import PeftModel
from real_base import tiny_with_its_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "A low-rank update of the weights"


def test_it_says_what_base_and_adapter_say(
    workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    folder = tiny_with_its_tokenizer(tmp_path / "base")
    recipe = tiny_recipe | {"base": {"source": "folder", "model": str(folder)}}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command in (("run",), ("release", "export", str(tmp_path / "merged"), "--gguf", "bf16", "--json")):
        done = ft_dagster(*command)
        assert done.returncode == 0, done.stderr
    file = Path(json.loads(done.stdout)["gguf"])
    from_gguf = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(workspace / "fine_tuned_model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        wanted, found = model(**inputs).logits.log_softmax(-1), from_gguf(**inputs).logits.log_softmax(-1)
        with model.disable_adapter():
            untuned = model(**inputs).logits.log_softmax(-1)
    rounding, learned = (float((other - wanted).abs().mean()) for other in (found, untuned))
    assert rounding < learned / 5, "what rounding to bfloat16 does is small beside what the adapter does"
    vocabulary = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert vocabulary(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
