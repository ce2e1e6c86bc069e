"""The one way to load an adapter: on the base model it was trained on, and on no other."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from ft_dagster.base import PreparedBase
from ft_dagster.training.manifest import AdapterError, check_adapter


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
