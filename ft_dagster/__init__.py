"""ft_dagster fine-tunes a language model on reports, and trains it again whenever they change."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__version__ = "0.1.0"


def load_released(workspace: "str | PathLike[str] | None" = None) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Return the released adapter on its base model, ready to generate text, and its tokenizer; for use in notebooks.

    Args:
        workspace: the folder of a workspace; by default the one that FT_WORKSPACE names, or the current folder.

    Raises:
        AdapterError: the workspace has no released adapter, a file of the adapter is damaged, or the base model is not
            the one that the adapter was trained on, according to the hashes in its manifest.
        BaseModelError: the base model is not available.
    """
    from ft_dagster.config.settings import load_settings
    from ft_dagster.model.adapter import load_released as load

    return load(load_settings(workspace))
