"""The base model's tokenizer, used so that text stays text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ft_dagster.base import tokenizer_config
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length


@dataclass(frozen=True)
class EncodedText:
    """Tokens of one text."""

    ids: list[int]
    starts: list[int]
    """Character position where each token begins; as long as ids."""
    lost_bytes: int
    """Bytes of characters that the vocabulary does not have."""


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
        self._unknown_id = self._tokenizer.token_to_id(_content(config.get("unk_token"))) if config else None
        added = self._tokenizer.encode("a").ids[: -len(self._tokenizer.encode("a", add_special_tokens=False).ids)]
        self.prefix = added[:1]
        """What the model expects before a text: its beginning-of-sequence token, or nothing."""

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokens of texts, no special token among them. Raises LedgerError if a text cannot be read back."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._checked(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _checked(self, text: str, encoding) -> EncodedText:  # type: ignore[no-untyped-def] # tokenizers has no stubs
        starts = [start for start, _ in encoding.offsets]
        if (back := self.decode(encoding.ids)) == text:
            return EncodedText(encoding.ids, starts, 0)
        unknown = [
            text[start:end]
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._unknown_id
        ]
        covered = "".join(back.split())
        if not unknown and covered != "".join(text.split()):
            raise LedgerError(f"The tokenizer does not give this text back: {text[:80]!r} became {back[:80]!r}")
        return EncodedText(encoding.ids, starts, sum(byte_length(piece) for piece in unknown))

    def _special(self, config: object, name: str, folder: Path) -> int:
        token = _content(config.get(name)) if isinstance(config, dict) else ""
        found = self._tokenizer.token_to_id(token) if token else None
        if found is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} names no {name} of the vocabulary ({json.dumps(token)})"
            )
        return found


def _content(token: object) -> str:
    """A special token's text: configurations hold it as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
