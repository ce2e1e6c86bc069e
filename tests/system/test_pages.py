"""The code blocks of each page do what it says for a reader who runs them from the top."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from code_blocks import DEMO, PAGES, RUN, Block, blocks_of, copy_project, run_blocks
from peft import PeftModel
from real_base import tiny_with_its_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

USING = "docs/using.md"
QUICK = {
    "name": "quick",
    "tokens": {"held_out": 0.05},
    "lora": {"rank": 8, "alpha": 16},
    "training": {"epochs": 0.3, "learning_rate": 2e-3, "rows_per_device": 1, "rows_per_step": 1},
    "evaluation": {"general": None, "chat": None, "train_tokens": 128, "sample_tokens": 4, "prompts": ["The most"]},
}
"""The training that pages run in place of the shipped recipe; it is enough for a release."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe for a tiny base with the tokenizer of the real one."""
    folder = tmp_path_factory.mktemp("tiny")
    base = {"source": "folder", "model": str(tiny_with_its_tokenizer(folder / "model")), "dtype": "float32"}
    recipe = folder / "quick.yaml"
    recipe.write_text(yaml.safe_dump(QUICK | {"base": base}), "utf-8")
    return recipe


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Return the workspace that `make demo` makes in a fresh clone with the tiny base."""
    folder = copy_project(tmp_path_factory.mktemp("demo") / "ft_dagster")
    assert "verdict" in run_blocks([Block("make demo", 1, "sh", "make demo\n")], folder, tiny)
    assert (folder / "demo" / "fine_tuned_model" / "manifest.json").is_file()
    return folder / "demo"


def used_of(page: str) -> list[Block]:
    return [block for block in blocks_of(page) if block.is_used and block.language in RUN]


@pytest.fixture
def run_page(tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function that runs a page in a fresh copy of the project and returns the copy."""

    def run(page: str) -> Path:
        folder = copy_project(tmp_path / "ft_dagster")
        if any(DEMO.search(block.code) for block in used_of(page)):
            shutil.copytree(request.getfixturevalue("demo"), folder / "demo", symlinks=True)
        run_blocks(used_of(page), folder, tiny)
        return folder

    return run


@pytest.mark.parametrize("page", [page for page in PAGES if used_of(page) and page != USING])
def test_the_commands_of_a_page_run_in_order(run_page: Callable[[str], Path], page: str) -> None:
    run_page(page)


def test_the_gguf_file_that_the_page_makes_predicts_what_base_and_adapter_predict(
    run_page: Callable[[str], Path], tiny: Path
) -> None:
    folder = run_page(USING)
    (file,) = (folder / "merged-gguf").glob("*.gguf")
    from_gguf: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(yaml.safe_load(tiny.read_text())["base"]["model"], dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder / "demo" / "fine_tuned_model"))
    tokens = torch.arange(3, 120)[None]
    with torch.inference_mode():
        wanted, found = model(tokens).logits.log_softmax(-1), from_gguf(tokens).logits.log_softmax(-1)
        with model.disable_adapter():
            untuned = model(tokens).logits.log_softmax(-1)
    rounding, learned = (float((other - wanted).abs().mean()) for other in (found, untuned))
    assert rounding < learned / 5, "what rounding to eight bits does is small beside what the adapter does"
    prompt, vocabulary = "The most important lesson", AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert vocabulary(prompt)["input_ids"] == AutoTokenizer.from_pretrained(file.parent)(prompt)["input_ids"]
