"""The base model's tokenizer, used so that text stays text."""

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from ft_dagster.base.prepare import tokenizer_config
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.dataset.byte_level import ByteLevelVocabulary


@dataclass(frozen=True)
class EncodedText:
    """Tokens of one text."""

    ids: list[int]
    lost: list[tuple[int, int]]
    """Spans of characters that the vocabulary does not have."""
    lost_bytes: int
    """Bytes of these characters."""
    find_starts: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @cached_property
    def starts(self) -> np.ndarray:
        """Character position where each token begins; as long as ids. Made when asked for: most texts are not cut."""
        return self.find_starts()

    def tokens_at(self, characters: Sequence[int]) -> list[int]:
        """The tokens that begin at these characters of the text, those that begin at none left out."""
        if not len(self.ids) or not len(characters):
            return []
        found = np.searchsorted(self.starts, characters)
        found, wanted = found[found < len(self.ids)], np.asarray(characters)[found < len(self.ids)]
        return found[self.starts[found] == wanted].tolist()


class DocumentTokenizer:
    """Encodes documents with a model's own vocabulary; loads in tens of milliseconds and needs no torch."""

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json` of a model's folder."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # `<|im_end|>` in a chapter is text, never a control token
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = tokenizer_config(folder)
        self.eos_id = self._special(config, "eos_token", folder)
        self._unknown_id = self._tokenizer.token_to_id(token_text(config.get("unk_token")))
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._control_ids = {number for number, token in added if token.special} - {self._unknown_id}
        self._byte_level = ByteLevelVocabulary.of(self._tokenizer)
        sample = self._tokenizer.encode("a")
        self.prefix = sample.ids[:1] if sample.special_tokens_mask[:1] == [1] else []
        """What the model expects before a text: its beginning-of-sequence token, or nothing."""

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokens of texts, no control token among them.

        Raises:
            LedgerError: a text cannot be read back (but for blank space and what is listed as lost), or part of it
                can only be read as a control token.
        """
        if self._byte_level is None:
            return self._encode_carefully(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._read_back(*pair) for pair in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _read_back(self, text: str, encoding: Encoding) -> EncodedText:
        assert self._byte_level is not None
        ids, data = encoding.ids, text.encode()
        if not self._byte_level.gives_back(ids, data):
            (found,) = self._encode_carefully([text])
            return found
        self._refuse_control(ids, text)
        return EncodedText(ids, [], 0, partial(self._byte_level.starts, ids, data))

    def _encode_carefully(self, texts: Sequence[str]) -> list[EncodedText]:
        """With the tokenizer's own decoder, and with account of what its vocabulary lacks."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        back = self._tokenizer.decode_batch(ids, skip_special_tokens=False)
        return [self._checked(*row) for row in zip(texts, encodings, ids, back, strict=True)]

    def _checked(self, text: str, encoding: Encoding, ids: list[int], read_back: str) -> EncodedText:
        self._refuse_control(ids, text)
        starts = partial(_starts, encoding)
        if read_back == text:
            return EncodedText(ids, [], 0, starts)
        tokens = list(zip(ids, encoding.offsets, strict=True))
        lost = [span for token, span in tokens if token == self._unknown_id]
        back = self.decode([token for token, _ in tokens if token != self._unknown_id])
        kept = _without(text, lost)
        if comparable(back) != comparable(kept):
            raise LedgerError(f"The tokenizer does not give this text back: {kept[:80]!r} became {back[:80]!r}")
        return EncodedText(ids, lost, byte_length(text) - byte_length(kept), starts)

    def _refuse_control(self, ids: list[int], text: str) -> None:
        if not self._control_ids.isdisjoint(ids):  # a vocabulary of whole pieces has them as ordinary ones
            control = next(token for token in ids if token in self._control_ids)
            raise LedgerError(f"The tokenizer reads {self.decode([control])!r} as a control token in {text[:80]!r}")

    def _special(self, config: Mapping[str, Any], name: str, folder: Path) -> int:
        token = token_text(config.get(name))
        found = self._tokenizer.token_to_id(token) if token else None
        if found is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} names no {name} of the vocabulary ({json.dumps(token)})"
            )
        return found


def _starts(encoding: Encoding) -> np.ndarray:
    return np.asarray([start for start, _ in encoding.offsets], dtype=np.int64)


def comparable(text: str) -> str:
    """A text for comparison: composed, without blank space. U+2581 stands for a space inside SentencePiece."""
    return "".join(unicodedata.normalize("NFC", text.replace("\u2581", " ")).split())


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """A text after deletion of spans, given in order."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))


def token_text(token: object) -> str:
    """A special token's text: configurations hold it as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
