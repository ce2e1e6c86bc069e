"""Load an adapter, but only on the base model that it was trained on."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.model.device import format_to_write_in
from ft_dagster.model.load import load_base
from ft_dagster.model.manifest import AdapterError, check_adapter, made_on, read_manifest


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, base: PreparedBase, name: str = "default"
) -> PeftModel:
    """Load an adapter onto a model, after checking that it belongs to the model.

    peft alone would load it onto any model of the same shape without a warning.

    Args:
        model: the model from `load_base`, or the one that this function returned, to load several adapters on one base.
        folder: the adapter's folder.
        base: the base model that `model` was loaded from.
        name: the name of the adapter on the model.

    Returns:
        The model with the adapter, in evaluation mode. The first adapter is the active one; `set_adapter` changes it.

    Raises:
        AdapterError: the adapter belongs to another base, tokenizer or chat template, or it is incomplete.
    """
    loaded_from = (model.get_base_model() if isinstance(model, PeftModel) else model).name_or_path
    if loaded_from != base.folder:
        raise AdapterError(
            f"The model was loaded from {loaded_from or 'nowhere'}, not from {base.name} in {base.folder}. Load it "
            "with load_base."
        )
    check_adapter(folder, base)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def load_for_use(base: PreparedBase, recipe: Recipe, folder: Path, offload: Path) -> PeftModel:
    """Load base and adapter as one model for generating text, in evaluation mode.

    On a CPU the model computes in float32, which generates token by token several times faster than bfloat16.

    Raises:
        AdapterError: the adapter does not belong to the base, or it is incomplete.
    """
    loaded: Any = load_base(base, recipe.computing_in(format_to_write_in()), offload)
    model: Any = load_adapter(loaded, folder, base)
    if recipe.base.quantization == "none" and not torch.cuda.is_available():
        model.float()
    return model.eval()


def load_released(settings: Settings, folder: Path | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the released adapter of a workspace on its base, and its tokenizer; see `ft_dagster.load_released`.

    Args:
        settings: the settings of the workspace.
        folder: the folder of the release, if the caller has already resolved the link `fine_tuned_model`.
    """
    # Resolved once, so that everything is read from the same release even if a new one appears meanwhile.
    folder = folder or settings.fine_tuned_model.resolve()
    recipe, base = made_on(read_manifest(folder), settings)
    return load_for_use(base, recipe, folder, settings.offload), AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
