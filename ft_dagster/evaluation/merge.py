"""Merge an adapter and its base into a model without adapters, and measure the result.

The adapter of a quantized base can be merged in two ways: into the dequantized weights, which are exactly those it was
trained on; or into the original weights, which have a higher precision but were not used in the training. Both merges
are made and measured on held-out text, and the better one is kept (QLoRA's authors merge into dequantized weights;
which is better depends on model and data).
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ft_dagster.base.model_folder import PreparedBase, model_config
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.dataset.dataset import load_shards
from ft_dagster.evaluation.request import ExportRequest
from ft_dagster.model.adapter import load_adapter
from ft_dagster.model.load import load_base
from ft_dagster.model.manifest import MANIFEST
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.products import decided
from ft_dagster.model.scoring import score
from ft_dagster.runtime.machine import memory_for_process
from ft_dagster.store.local import Artifact, with_usual_rights, write_atomically

MERGED = "merged.json"
"""File beside the merged model that records how it was made and what was measured."""
OWN, DEQUANTIZED = "the base's own weights", "dequantized weights"


def merge(request: ExportRequest) -> dict[str, Any]:
    """Merge, measure, and write the better model with its tokenizer, the adapter's manifest and `merged.json`.

    Returns:
        The content of `merged.json`: `merged_into`, and `bits_per_byte` of the adapter on its base and of each merge,
        which is empty if there is no held-out text to measure on.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    recipe = decided(request.resolved_recipe())
    plain = _unquantized(recipe)
    output = Path(request.output)
    measured: dict[str, float] = {}
    tokenizer = AutoTokenizer.from_pretrained(request.adapter, trust_remote_code=False)

    def measure(name: str, model: Any, computed_as: Recipe) -> None:
        shards = list(load_shards(Artifact.open(Path(request.dataset)), "held_out")) if request.dataset else []
        if shards:  # a refit was trained on everything
            measured[name] = score(PackedModel(model, computed_as), shards, tokenizer.eos_token_id)["bits_per_byte"]

    measure("adapter", _with_adapter(request, recipe), recipe)
    ways = (OWN, DEQUANTIZED) if recipe.base.quantization != "none" else (OWN,)
    for way in ways:
        model = _merged(request, recipe, way)
        model.save_pretrained(output / way.replace(" ", "-"))
        model = _converted(model, getattr(torch, plain.base.dtype))  # the saved weights, in a format that is fast here
        measure(way, model, plain)
        del model
    best = min(ways, key=lambda way: measured.get(way, 0.0))
    folder = output / best.replace(" ", "-")
    for path in folder.iterdir():
        path.rename(output / path.name)
    for way in ways:
        shutil.rmtree(output / way.replace(" ", "-"))
    tokenizer.save_pretrained(output)
    shutil.copy(Path(request.adapter) / MANIFEST, output / MANIFEST)
    with_usual_rights(output)
    about = {"merged_into": best, "bits_per_byte": measured}
    write_atomically(output / MERGED, json.dumps(about, indent=1))
    return about


def _with_adapter(request: ExportRequest, recipe: Recipe) -> Any:
    base = request.prepared_base()
    return load_adapter(load_base(base, recipe, Path(request.offload)), Path(request.adapter), base)


def _merged(request: ExportRequest, recipe: Recipe, way: str) -> PreTrainedModel:
    """Return the merged model in the dtype in which the base is stored.

    On a CPU the weights are added in float32 if that fits into memory, so that they are rounded only once.
    """
    base = request.prepared_base()
    _free_memory()
    if way == DEQUANTIZED:
        loaded: Any = load_base(base, recipe, Path(request.offload)).dequantize()
    else:
        loaded = load_base(base, _unquantized(recipe), Path(request.offload))
    stored = _stored_dtype(base, loaded.dtype)
    if not torch.cuda.is_available() and 4 * loaded.num_parameters() < memory_for_process() / 2:
        loaded.float()
    model: Any = load_adapter(loaded, Path(request.adapter), base).merge_and_unload(safe_merge=True)
    model.config.use_cache = True
    return _converted(model, stored)


def _converted(model: Any, dtype: torch.dtype) -> Any:
    """Return the model in a dtype; unchanged if layers are offloaded to disk, which accelerate refuses to convert."""
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return model if model.dtype == dtype or offloaded else model.to(dtype)


def _stored_dtype(base: PreparedBase, otherwise: torch.dtype) -> torch.dtype:
    config = model_config(Path(base.folder))
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else otherwise


def _free_memory() -> None:
    """Free the memory of the previous model, because `load_base` looks at how much is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unquantized(recipe: Recipe) -> Recipe:
    content = recipe.model_dump(mode="json")
    content["base"]["quantization"] = "none"
    return resolve_recipe(content)
