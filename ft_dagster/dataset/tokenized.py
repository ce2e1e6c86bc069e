"""Tokenizing sections, and cutting them into pieces that fit a block."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.dataset.documents import find_breaks, render, source_spans
from ft_dagster.dataset.splitting import cut_positions, split_document
from ft_dagster.dataset.tokenizer import DocumentTokenizer, EncodedText

_BATCH = 512
"""Number of documents that are tokenized together: enough to keep all cores busy until the end of most batches."""


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens. Sections or pairs with the same hash have the same tokens."""

    pieces: tuple[np.ndarray, ...]
    """Token ids (int32) of each piece, at most a block long. Each piece except the first starts with a context token,
    which is the last token of the piece before it."""
    tokens: int
    """Number of tokens of the text, without end-of-sequence, beginning-of-sequence, context and prompt."""
    bytes: int
    """Number of UTF-8 bytes of the text as the model reads it, including heading marks."""
    scored_bytes: int
    """Number of these bytes whose tokens can be predicted: without a beginning-of-sequence token, the first cannot."""
    lost_bytes: int
    """Number of bytes of the source that the vocabulary lacks."""
    prompt: int = 1
    """Number of tokens at the start of each piece that are read and not supervised: at least one, because nothing
    predicts the first token of a text."""


def tokenize_sections(
    sections: Iterable[Section], tokenizer: DocumentTokenizer, block_length: int
) -> Iterator[tuple[str, TokenizedText]]:
    """Yield the hash and the tokens of each section.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
    """
    remaining = iter(sections)
    while batch := list(islice(remaining, _BATCH)):
        texts = [render(section) for section in batch]
        try:
            encoded = tokenizer.encode(texts)
        except LedgerError as error:
            raise CorpusError(_refused(batch, texts, tokenizer) or str(error)) from error
        for section, text, tokens in zip(batch, texts, encoded, strict=True):
            yield section.hash, _text(section, text, tokens, tokenizer, block_length)


def _refused(batch: Sequence[Section], texts: Sequence[str], tokenizer: DocumentTokenizer) -> str | None:
    """Return which of these texts cannot be tokenized, and what to do."""
    for section, text in zip(batch, texts, strict=True):
        try:
            tokenizer.encode([text])
        except LedgerError as error:
            place = f", {section.title!r}" if section.title else ""
            return f"{section.source}{place}: {error}. Remove these characters, or use another base model."
    return None


def _text(
    section: Section, text: str, encoded: EncodedText, tokenizer: DocumentTokenizer, block_length: int
) -> TokenizedText:
    offset = len(tokenizer.prefix)
    ids = np.asarray([*tokenizer.prefix, *encoded.ids, tokenizer.eos_id], dtype=np.int32)
    cuts: list[list[int]] = []
    if len(ids) > block_length:
        cuts = [[at + offset for at in kind] for kind in cut_positions(encoded.tokens_at, find_breaks(text))]
    first_scored = 0 if offset else int(encoded.starts[1]) if len(encoded.ids) > 1 else len(text)
    return TokenizedText(
        tuple(ids[piece.first - piece.context : piece.after] for piece in split_document(len(ids), cuts, block_length)),
        tokens=len(encoded.ids),
        bytes=byte_length(text),
        scored_bytes=byte_length(text[first_scored:]),
        lost_bytes=_lost_bytes(section, text, encoded),
    )


def _lost_bytes(section: Section, text: str, encoded: EncodedText) -> int:
    """Return the number of source bytes that the vocabulary lacks, except heading marks, which are counted as marks."""
    return sum(
        byte_length(text[max(start, first) : min(end, after)])
        for start, end in encoded.lost
        for first, after in source_spans(section)
    )
