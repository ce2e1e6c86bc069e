"""Measure a base model and its adapters, and load the base only once."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ft_dagster.config.recipe_file import RecipeError
from ft_dagster.dataset.dataset import load_shards
from ft_dagster.evaluation.eval_sets import tokenize_eval_set
from ft_dagster.evaluation.memorization import measure_on_train, sample_rows
from ft_dagster.evaluation.request import BASE, NEW, RESULT, EvaluationRequest
from ft_dagster.evaluation.samples import continue_prompt
from ft_dagster.model.adapter import load_adapter
from ft_dagster.model.load import load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.products import decided
from ft_dagster.model.scoring import score
from ft_dagster.store.local import Artifact, write_atomically

log = logging.getLogger(__name__)
HELD_OUT = "held_out"


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Measure the base and each adapter on held-out chapters, eval sets and text trained on, and generate samples.

    Writes `<output>/evaluation.json` last, and returns its content: `models` by name, `not_measured` (the eval sets
    that this base cannot be measured on, with the reason), `seconds`, and `seconds_by_part`. A model has what
    `summarize` returns for held-out chapters; under `general` and `chat` the same for these eval sets; under `train`,
    for the base and the new adapter, what `measure_on_train` returns; and `samples`.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    began = time.monotonic()
    recipe = decided(request.resolved_recipe())
    base = request.prepared_base()
    dataset = Artifact.open(Path(request.dataset))
    held_out = list(load_shards(dataset, "held_out"))
    texts = {HELD_OUT: held_out} if held_out else {}  # a refit was trained on everything
    not_measured = {}
    for kind, found in request.eval_sets().items():
        try:
            texts[kind] = [tokenize_eval_set(found, Path(base.folder), recipe.tokens.block_length)]
        except RecipeError as error:
            if not found.ships:
                raise
            # The texts that ship are only the default, and they do not fit every base and block.
            log.warning("%s", error)
            not_measured[kind] = str(error)
    taught = sample_rows(load_shards(dataset, "train"), recipe.evaluation.train_tokens)
    tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    model: Any = load_base(base, recipe, Path(request.offload))
    for name, folder in request.adapters.items():
        model = load_adapter(model, Path(folder), base, name)
    packed = PackedModel(model, recipe)
    models = dict(request.known)
    unknown = [name for name in (BASE, *request.adapters) if name not in models]
    log.info("Measuring %s; measured before: %s", ", ".join(unknown), ", ".join(request.known) or "none")
    seconds = {"loading": time.monotonic() - began}
    for name in unknown:
        models[name] = {}
        for kind, shards in texts.items():
            with _switched_to(model, name), _timed(seconds, kind):
                scored = score(packed, shards, tokenizer.eos_token_id)
            models[name] |= scored if kind == HELD_OUT else {kind: scored}
    for name in (BASE, NEW):
        with _switched_to(model, name), _timed(seconds, "train"):
            models[name] = models[name] | {"train": measure_on_train(packed, taught, tokenizer)}
    if recipe.base.quantization == "none" and not torch.cuda.is_available():
        model.float()  # decoding one token at a time is several times slower in bfloat16 on a CPU
    for name in unknown:
        with _switched_to(model, name), _timed(seconds, "samples"):
            models[name]["samples"] = [
                {
                    "prompt": prompt,
                    "text": continue_prompt(model, tokenizer, prompt, recipe.evaluation.sample_tokens),
                }
                for prompt in recipe.evaluation.prompts
            ]
    result = {
        "models": models,
        "not_measured": not_measured,
        "seconds": time.monotonic() - began,
        "seconds_by_part": seconds,
    }
    write_atomically(Path(request.output) / RESULT, json.dumps(result, indent=1, ensure_ascii=False))
    return result


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.monotonic() - began


def _switched_to(model: PeftModel, name: str) -> AbstractContextManager[Any]:
    """Return a context in which the model is the base, or has one of its adapters switched on."""
    if name == BASE:
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()
