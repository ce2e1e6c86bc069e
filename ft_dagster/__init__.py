"""ft_dagster keeps a fine-tuned language model as fresh as the reports it learned from."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__version__ = "0.1.0"


def load_released(workspace: "str | PathLike[str] | None" = None) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """The released adapter on its base model, ready to write text, and its tokenizer; for notebooks.

    Args:
        workspace: the folder of a workspace; by default the one that FT_WORKSPACE names, or the current folder.

    Raises:
        AdapterError: nothing is released there, or the base is another one than the adapter was trained on, by the
            hashes in its manifest, or a file of the adapter is damaged.
        BaseModelError: the base model cannot be had.
    """
    from ft_dagster.config.settings import load_settings
    from ft_dagster.model.adapter import load_released as load

    return load(load_settings(workspace))
