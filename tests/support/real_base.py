"""The embedded base model in tests: with a quick recipe, and its tokenizer with a tiny model."""

import shutil
from pathlib import Path
from typing import Any

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings

PROJECT = Path(__file__).parents[2]
CHAPTERS = PROJECT / "ft_dagster" / "examples" / "chapter_markdowns"
TEXTS = PROJECT / "ft_dagster" / "evaluation" / "texts"
BASE = {"source": "embedded", "model": "smollm2-135m-instruct"}


def cache() -> Path:
    """Where the converted base is kept between test runs."""
    return Settings().cache


def quick_recipe(workspace: Path, **training: Any) -> dict[str, Any]:
    """Return the shipped recipe for the real base with one epoch and few texts, which it puts into the workspace.

    Args:
        workspace: a folder.
        training: other fields of this part.
    """
    recipe = load_recipe("smollm2-135m").model_dump(mode="json")
    recipe["base"] |= BASE
    recipe["training"] |= {"epochs": 1, **training}
    recipe["evaluation"] |= {"prompts": ["A low-rank update"], "sample_tokens": 8, "train_tokens": 512}
    recipe["evaluation"] |= {kind: str(_some_texts(workspace, kind)) for kind in ("general", "chat")}
    return recipe


def _some_texts(workspace: Path, kind: str) -> Path:
    """Make a folder with the first three of the shipped texts for evaluation."""
    folder = workspace / kind
    folder.mkdir(parents=True)
    for path in sorted((TEXTS / kind).iterdir())[:3]:
        shutil.copy(path, folder)
    return folder


def tiny_with_its_tokenizer(folder: Path) -> Path:
    """Make a random Llama of three million parameters with the tokenizer and chat template of the real base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(prepare_base(load_recipe("smollm2-135m").base, cache()).folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
