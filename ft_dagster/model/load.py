"""Load the base model with frozen weights, and add a new adapter to it."""

import difflib
import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import verify_base
from ft_dagster.config.recipe import Lora, Recipe
from ft_dagster.errors import TrainingError
from ft_dagster.model import ranks
from ft_dagster.model.device import device
from ft_dagster.model.products import decided

log = logging.getLogger(__name__)
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Architectures for which peft refuses adapters on some layers (peft/tuners/tuners_utils.py)."""
_NOT_ADAPTABLE = ("out_proj", "conv1d")
"""The names of these layers."""


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores the frozen weights, or None if they are not quantized."""
    if recipe.base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, recipe.compute_dtype),
            # FSDP shards only parameters of one dtype.
            bnb_4bit_quant_storage=getattr(torch, recipe.base.dtype if recipe.training.strategy == "fsdp" else "uint8"),
        )
    if recipe.base.quantization == "int8":
        # It computes products in float16 whatever the input is, and logs that at every layer of every step.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def load_base(base: PreparedBase, recipe: Recipe, offload: Path | None) -> PreTrainedModel:
    """Load the base model of an adapter, prepared as in training, after checking its weights against their hash.

    Training and evaluation both load it here: a k-bit model that is prepared differently computes differently.

    Args:
        base: the base model.
        recipe: the recipe that the model is loaded for.
        offload: folder for layers that fit neither on the GPU nor in memory. None for training: offloaded layers are on
            torch's meta device, without weights that an adapter could be trained on.

    Raises:
        TrainingError: the recipe computes in float16, and there is no GPU.
    """
    recipe = decided(recipe)
    if recipe.compute_dtype == "float16" and not torch.cuda.is_available():
        named = "training.mixed_precision: fp16" if recipe.training.mixed_precision else "base.dtype: float16"
        raise TrainingError(f"{named} needs a GPU. Let the machine decide with base.dtype: auto, or name float32.")
    if ranks.is_first():
        verify_base(base)
    quantized = recipe.base.quantization != "none"
    placement: dict[str, Any] = {"device_map": {"": "cpu"}}
    if torch.cuda.is_available() and ranks.count() > 1:  # each process loads all of it; FSDP then shards it
        placement = {"device_map": {"": device() if recipe.training.strategy == "ddp" else "cpu"}}
    elif torch.cuda.is_available() and offload is None:
        placement = {"device_map": {"": device()}}
    elif torch.cuda.is_available() and offload is not None:
        offload.mkdir(parents=True, exist_ok=True)
        free, _ = torch.cuda.mem_get_info(0)
        capacity = {0: int(free * 0.95), "cpu": psutil.virtual_memory().available}  # the rest goes to disk
        placement = {"device_map": "auto", "max_memory": capacity, "offload_folder": str(offload)}
    model = _from_pretrained(
        base,
        recipe.training.attention,
        dtype=getattr(torch, recipe.base.dtype),
        quantization_config=quantization_config(recipe),
        **placement,
    )
    model.config.use_cache = False  # with a cache, packed documents would attend to each other
    if quantized:
        prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=recipe.training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return model


def _from_pretrained(base: PreparedBase, attention: str, **options: Any) -> PreTrainedModel:
    """Load the model with an implementation of attention, or with the plain one if the model has no other."""

    def load(implementation: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            base.folder,
            attn_implementation=implementation,
            use_safetensors=True,  # otherwise it would fall back to pickles
            trust_remote_code=False,
            **options,
        )

    try:
        return load(attention)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
    log.info("%s has no fused attention in transformers (sdpa); attention is computed step by step (eager).", base.name)
    return load("eager")


def add_adapter(model: PreTrainedModel, base: PreparedBase, recipe: Recipe) -> PeftModel:
    """Add a new LoRA adapter to the model, seeded here: TrainingArguments.seed comes too late for initial weights."""
    set_seed(recipe.training.seed)
    config = lora_config(recipe.lora, _check_targets(model, base, recipe.lora.targets))
    if config.target_modules == "all-linear" and model.config.model_type in _MAMBA:
        config.exclude_modules = set(_NOT_ADAPTABLE)
    tuned = get_peft_model(model, config)
    # The base for loading it elsewhere: a name on the hub works everywhere, the folder that peft wrote only here.
    config.base_model_name_or_path = recipe.base.model if recipe.base.source == "hub" else base.folder
    config.revision = recipe.base.revision
    return tuned


def lora_config(lora: Lora, targets: str | list[str]) -> LoraConfig:
    """Return peft's configuration of the adapter."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def _check_targets(model: PreTrainedModel, base: PreparedBase, targets: str | list[str]) -> str | list[str]:
    """Raise TrainingError if the base lacks any of the target layers. peft accepts targets if it finds one of them."""
    if targets == "all-linear":
        return targets
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, kinds) and layer is not head]
    left_out = _NOT_ADAPTABLE if model.config.model_type in _MAMBA else ()
    known = sorted({name.rpartition(".")[2] for name in linear}.difference(left_out))
    if not known:
        raise TrainingError(f"{base.name} has no linear layer that an adapter could be added to.")
    for target in targets:
        if target in left_out:
            raise TrainingError(
                f"lora.targets of the recipe names {target!r}, whose weights {base.name} uses without calling the "
                f"layer, so that an adapter has no effect there. Name others: {', '.join(known)}."
            )
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
            raise TrainingError(
                f"lora.targets of the recipe does not fit {base.name}, which has no linear layer {target!r} (did you "
                f"mean {nearest[0]}?). It has {', '.join(known)}."
            )
    return targets
