"""The base model's tokenizer, used so that report text is never read as a control token."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from ft_dagster.base.model_folder import BaseModelError, end_of_text, model_config, token_text, tokenizer_config
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.dataset.byte_level import ByteLevelVocabulary

_AROUND = 40
"""Characters that a message shows before and after the place where a text is not reproduced."""


@dataclass(frozen=True)
class EncodedText:
    """The tokens of one text."""

    ids: list[int]
    lost: list[tuple[int, int]]
    """Spans of characters that the vocabulary lacks."""
    lost_bytes: int
    """Number of bytes of these characters."""
    find_starts: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @cached_property
    def starts(self) -> np.ndarray:
        """Character position where each token of `ids` starts. Computed on first use: most texts are not cut."""
        return self.find_starts()

    def tokens_at(self, characters: Sequence[int]) -> list[int]:
        """Return the tokens that start at these characters. Characters at which no token starts are skipped."""
        if not len(self.ids) or not len(characters):
            return []
        found = np.searchsorted(self.starts, characters)
        found, wanted = found[found < len(self.ids)], np.asarray(characters)[found < len(self.ids)]
        return found[self.starts[found] == wanted].tolist()


class DocumentTokenizer:
    """Encodes documents with a model's own vocabulary. It loads in tens of milliseconds and does not need torch."""

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json` from the folder of a model."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # `<|im_end|>` in a chapter is text, never a control token
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = tokenizer_config(folder)
        self.eos_id = self._end_of_text(folder)
        self._require_embeddings(folder)
        self._unknown_id = self._tokenizer.token_to_id(token_text(config.get("unk_token")))
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._control_ids = {number for number, token in added if token.special} - {self._unknown_id}
        self._byte_level = ByteLevelVocabulary.of(self._tokenizer)
        sample = self._tokenizer.encode("a")
        self.prefix = sample.ids[:1] if sample.special_tokens_mask[:1] == [1] else []
        """The tokens that the model expects before a text: its beginning-of-sequence token, or none."""

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Return the tokens of texts, which contain no control tokens.

        Raises:
            LedgerError: a text does not round-trip (except for white space and the spans that are listed as lost), or
                part of it can only be read as a control token.
        """
        if self._byte_level is None:
            return self._encode_carefully(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._read_back(*pair) for pair in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, with special tokens written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _read_back(self, text: str, encoding: Encoding) -> EncodedText:
        assert self._byte_level is not None
        ids, data = encoding.ids, text.encode()
        if not self._byte_level.round_trips(ids, data):
            (found,) = self._encode_carefully([text])
            return found
        self._refuse_control(ids, text)
        return EncodedText(ids, [], 0, partial(self._byte_level.starts, ids, data))

    def _encode_carefully(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode texts, check them with the tokenizer's own decoder, and record what its vocabulary lacks."""
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
            was, now = _difference(kept, back)
            raise LedgerError(f"The tokenizer does not reproduce this text: {was!r} became {now!r}")
        return EncodedText(ids, lost, byte_length(text) - byte_length(kept), starts)

    def _refuse_control(self, ids: list[int], text: str) -> None:
        # A vocabulary of whole pieces contains control tokens as ordinary pieces, too.
        if not self._control_ids.isdisjoint(ids):
            control = next(token for token in ids if token in self._control_ids)
            raise LedgerError(f"The tokenizer reads {self.decode([control])!r} as a control token in {text[:80]!r}")

    def _end_of_text(self, folder: Path) -> int:
        """Return the end-of-sequence token. Raises BaseModelError if the folder names none that is known."""
        named = end_of_text(folder)
        found = self._tokenizer.token_to_id(named) if isinstance(named, str) else named
        if found is None or self._tokenizer.id_to_token(found) is None:
            raise BaseModelError(
                f"{folder / 'tokenizer_config.json'} names no eos_token that is in the vocabulary "
                f"({json.dumps(named)}), so no text could end. Add it there."
            )
        return found

    def _require_embeddings(self, folder: Path) -> None:
        """Raise BaseModelError if the model has fewer embeddings than the tokenizer has tokens for text."""
        config = model_config(folder) if (folder / "config.json").is_file() else {}
        known = (config.get("text_config") or {}).get("vocab_size") or config.get("vocab_size")
        needed = max(self._tokenizer.get_vocab_size(with_added_tokens=False), self.eos_id + 1)
        if known is not None and known < needed:
            raise BaseModelError(
                f"The tokenizer in {folder} has {needed:,} tokens, and the model only {known:,} embeddings, so it "
                "cannot read every text. Use the model's own tokenizer, or enlarge its embeddings with transformers' "
                "resize_token_embeddings."
            )


def _starts(encoding: Encoding) -> np.ndarray:
    return np.asarray([start for start, _ in encoding.offsets], dtype=np.int64)


def _difference(kept: str, back: str) -> tuple[str, str]:
    """Return the first place where two texts differ, white space aside, with some characters around it."""
    if max(len(kept), len(back)) <= 2 * _AROUND:
        return kept, back
    one, other = comparable(kept), comparable(back)
    common = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    first = max(0, common - _AROUND // 2)
    return one[first : common + _AROUND], other[first : common + _AROUND]


def comparable(text: str) -> str:
    """Return a text for comparison: composed (NFC), without white space. U+2581 is a space in SentencePiece."""
    return "".join(unicodedata.normalize("NFC", text.replace("\u2581", " ")).split())


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """Return a text without the given spans, which are in order."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
