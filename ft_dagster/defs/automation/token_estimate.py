"""An estimate of how many bytes of the reports make a token, from a sample of their text."""

from pathlib import Path

from tokenizers import Tokenizer

from ft_dagster.base.model_folder import BaseModelError
from ft_dagster.base.prepare import local_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.index import Scan

_FILES, _BYTES = 32, 4096
"""The sample: the beginnings of this many files, each of this many bytes. It is tokenized in milliseconds."""
_ASCII_BYTES_PER_TOKEN = 4.0
_TOKENS_PER_CHARACTER = 1.0
"""Used while there is no tokenizer on this machine."""


def bytes_per_token(settings: Settings, recipe: Recipe, scan: Scan) -> float:
    """Return the bytes of report text per token, by the base model's tokenizer if it is on this machine.

    Scripts differ by more than a factor of two, so a sample of the reports is tokenized. Without a tokenizer, ASCII
    and other characters of the sample are counted.
    """
    texts = [_beginning(settings.workspace / scan.files[at].path) for at in _spread(len(scan.files))]
    size = sum(len(text.encode()) for text in texts)
    if not size:
        return _ASCII_BYTES_PER_TOKEN
    try:
        base = local_base(recipe.base, settings.cache)
    except BaseModelError:
        base = None
    if base is None:
        ascii_bytes = sum((text.isascii() and len(text)) or sum(c.isascii() for c in text) for text in texts)
        others = sum(len(text) for text in texts) - ascii_bytes
        return size / (ascii_bytes / _ASCII_BYTES_PER_TOKEN + others * _TOKENS_PER_CHARACTER)
    tokenizer = Tokenizer.from_file(str(Path(base.folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return size / max(1, sum(len(found) for found in tokenizer.encode_batch(texts, add_special_tokens=False)))


def _spread(count: int) -> list[int]:
    """Return at most _FILES numbers below `count`, evenly spaced.

    >>> _spread(2), len(_spread(1000))
    ([0, 1], 32)
    """
    return [at * count // min(count, _FILES) for at in range(min(count, _FILES))]


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES).decode("utf-8", "ignore")
    except OSError:  # the file was removed after the scan
        return ""
