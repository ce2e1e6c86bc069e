"""The base model with frozen weights, and the adapter on it."""

from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed

from ft_dagster.base import PreparedBase, verify_base
from ft_dagster.recipe import Recipe
from ft_dagster.training.progress import TrainingError


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """How bitsandbytes holds the frozen weights; None where they stay as they are."""
    if recipe.base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, recipe.base.dtype),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if recipe.base.quantization == "int8" else None


def load_base(base: PreparedBase, recipe: Recipe, offload: Path) -> PreTrainedModel:
    """The base model of an adapter, prepared as in training, its weights checked against their hash.

    Training and evaluation both load it here: a k-bit model that is prepared differently computes differently.
    """
    verify_base(base)
    quantized = recipe.base.quantization != "none"
    placement: dict[str, Any] = {"device_map": {"": "cpu"}}
    if torch.cuda.is_available():
        offload.mkdir(parents=True, exist_ok=True)
        free, _ = torch.cuda.mem_get_info(0)
        room = {0: int(free * 0.95), "cpu": psutil.virtual_memory().available}  # what fits in neither goes to disk
        placement = {"device_map": "auto", "max_memory": room, "offload_folder": str(offload)}
    model = AutoModelForCausalLM.from_pretrained(
        base.folder,
        dtype=getattr(torch, recipe.base.dtype),
        quantization_config=quantization_config(recipe),
        attn_implementation=recipe.training.attention,
        trust_remote_code=False,
        **placement,
    )
    model.config.use_cache = False  # with a cache, packed documents would see each other
    if quantized:
        prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=recipe.training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return model


def add_adapter(model: PreTrainedModel, base: PreparedBase, recipe: Recipe) -> PeftModel:
    """A fresh LoRA adapter on the model. Seeded here: TrainingArguments.seed comes too late for its first weights."""
    set_seed(recipe.training.seed)
    lora = recipe.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
        # What loads it elsewhere: a hub's name is known everywhere, a folder only here.
        base_model_name_or_path=recipe.base.model if recipe.base.source == "hub" else base.folder,
        revision=recipe.base.revision,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # peft names the layers it looked for
        raise TrainingError(f"lora.targets of the recipe does not fit {base.name}: {error}") from error
