"""Measure a base model and adapters on it, loading the base once."""

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ft_dagster.evaluation.request import RESULT, EvaluationRequest
from ft_dagster.evaluation.samples import continue_prompt
from ft_dagster.store import Artifact, write_atomically
from ft_dagster.tokens.dataset import load_shards
from ft_dagster.training.adapter import load_adapter
from ft_dagster.training.device import one_process_a_device
from ft_dagster.training.model import load_base
from ft_dagster.training.packed_model import PackedModel
from ft_dagster.training.scoring import score

log = logging.getLogger(__name__)
BASE = "base"


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Bits per byte on the held-out chapters and samples, for the base and for each adapter.

    Writes `<output>/evaluation.json` last, and returns what it holds: `models` by name, `seconds`, and
    `seconds_by_part`.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    with one_process_a_device(Path(request.locks)):
        return _evaluate(request)


def _evaluate(request: EvaluationRequest) -> dict[str, Any]:
    began = time.monotonic()
    recipe = request.resolved_recipe()
    base = request.prepared_base()
    held_out = list(load_shards(Artifact.open(Path(request.dataset)), "held_out"))
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model: Any = load_base(base, recipe, Path(request.offload))
    for name, folder in request.adapters.items():
        model = load_adapter(model, Path(folder), base, name)
    packed = PackedModel(model, recipe)
    models = dict(request.known)
    unknown = [name for name in (BASE, *request.adapters) if name not in models]
    log.info("Measuring %s; measured before: %s", ", ".join(unknown), ", ".join(request.known) or "none")
    loaded = time.monotonic()
    for name in unknown:
        with _as(model, name):
            models[name] = score(packed, held_out, tokenizer.eos_token_id)
    scored = time.monotonic()
    if recipe.base.quantization == "none" and not torch.cuda.is_available():
        model.float()  # decoding one token at a time is several times slower in bfloat16 on a CPU
    for name in unknown:
        with _as(model, name):
            models[name]["samples"] = [
                {
                    "prompt": prompt,
                    "text": continue_prompt(model, tokenizer, prompt, recipe.evaluation.sample_tokens),
                }
                for prompt in recipe.evaluation.prompts
            ]
    ended = time.monotonic()
    result = {
        "models": models,
        "seconds": ended - began,
        "seconds_by_part": {"loading": loaded - began, "scoring": scored - loaded, "samples": ended - scored},
    }
    output = Path(request.output)
    write_atomically(output / RESULT, json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _as(model: PeftModel, name: str) -> AbstractContextManager[Any]:
    """The model as the base, or with one of its adapters."""
    if name == BASE:
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()
