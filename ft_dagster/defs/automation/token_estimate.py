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
_ASCII_BYTES_PER_TOKEN, _OTHER_BYTES_PER_TOKEN = 4.0, 1.8
"""Used while there is no tokenizer on this machine. With SmolLM2's tokenizer, the example report, in English, has 4.1
bytes per token; sentences in Thai, Khmer, Chinese, Japanese and Arabic 1.4 to 2.0; in Greek and Russian 2.1 to 2.5."""


def bytes_per_token(settings: Settings, recipe: Recipe, scan: Scan) -> float:
    """Return the bytes of report text per token, by the base model's tokenizer if it is on this machine.

    Scripts differ by more than a factor of two, so a sample of the reports is tokenized. Without a tokenizer, the
    bytes of ASCII and of other characters in the sample are counted.
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
        ascii_bytes = sum(character.isascii() for text in texts for character in text)
        return size / (ascii_bytes / _ASCII_BYTES_PER_TOKEN + (size - ascii_bytes) / _OTHER_BYTES_PER_TOKEN)
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
