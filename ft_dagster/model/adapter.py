"""The one way to load an adapter: on the base model it was trained on, and on no other."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ft_dagster.base.prepare import PreparedBase
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.model.device import format_to_write_in
from ft_dagster.model.load import load_base
from ft_dagster.model.manifest import AdapterError, check_adapter, made_on, read_manifest


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, base: PreparedBase, name: str = "default"
) -> PeftModel:
    """Put an adapter on a model. peft alone would put it on any model of the same shape without a word.

    Args:
        model: from `load_base`, or what this function returned, to have several adapters on one base.
        folder: the adapter's.
        base: what the model was loaded from.
        name: what the adapter is called on the model.

    Returns:
        The model with the adapter, in evaluation mode. The first adapter is the active one; `set_adapter` changes it.

    Raises:
        AdapterError: the adapter belongs to another base, tokenizer or chat template, or is not whole.
    """
    loaded_from = (model.get_base_model() if isinstance(model, PeftModel) else model).name_or_path
    if loaded_from != base.folder:
        raise AdapterError(
            f"The model was loaded from {loaded_from or 'nowhere'}, not from {base.name} in {base.folder}."
        )
    check_adapter(folder, base)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def load_for_use(base: PreparedBase, recipe: Recipe, folder: Path, offload: Path) -> PeftModel:
    """Base and adapter as one model that writes text, in evaluation mode.

    On a CPU it computes in float32, in which one token at a time comes several times faster than in bfloat16.

    Raises:
        AdapterError: the adapter does not belong to the base, or is not whole.
    """
    loaded: Any = load_base(base, recipe.computing_in(format_to_write_in()), offload)
    model: Any = load_adapter(loaded, folder, base)
    if recipe.base.quantization == "none" and not torch.cuda.is_available():
        model.float()
    return model.eval()


def load_released(settings: Settings, folder: Path | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The released adapter of a workspace on its base, and its tokenizer; see `ft_dagster.load_released`.

    Args:
        settings: of the workspace.
        folder: of the release, where the link `fine_tuned_model` was followed before.
    """
    folder = folder or settings.fine_tuned_model.resolve()  # one release, also if another one is made meanwhile
    recipe, base = made_on(read_manifest(folder), settings)
    return load_for_use(base, recipe, folder, settings.offload), AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
