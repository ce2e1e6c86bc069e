"""Sections as tokens, cut into pieces that fit a block."""

from collections.abc import Iterable, Iterator
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
"""Documents tokenized together: enough that all cores are busy to the end of most batches."""


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens. Sections, and pairs, with the same hash have the same."""

    pieces: tuple[np.ndarray, ...]
    """int32, each of at most a block; each but the first begins with a token of context, the last of the one before."""
    tokens: int
    """Tokens of the text, without end-of-sequence, beginning-of-sequence, context and prompt."""
    bytes: int
    """UTF-8 bytes of the text as the model reads it, heading marks included."""
    scored_bytes: int
    """Of these, the bytes whose tokens can be predicted: without a beginning-of-sequence token the first cannot."""
    lost_bytes: int
    """Bytes of the source that the vocabulary lacks."""
    prompt: int = 1
    """Tokens at the beginning of each piece that are read and not supervised: nothing predicts the first of a text."""


def tokenize_sections(
    sections: Iterable[Section], tokenizer: DocumentTokenizer, block_length: int
) -> Iterator[tuple[str, TokenizedText]]:
    """The hash and the tokens of each section.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
    """
    remaining = iter(sections)
    while batch := list(islice(remaining, _BATCH)):
        texts = [render(section) for section in batch]
        try:
            encoded = tokenizer.encode(texts)
        except LedgerError as error:
            chapters = ", ".join(sorted({section.source for section in batch}))
            raise CorpusError(
                f"{error}. It is in one of {chapters}. Take these characters out, or use another base model."
            ) from error
        for section, text, tokens in zip(batch, texts, encoded, strict=True):
            yield section.hash, _text(section, text, tokens, tokenizer, block_length)


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
    """Bytes of the source that the vocabulary lacks; heading marks it lacks are counted as marks already."""
    return sum(
        byte_length(text[max(start, first) : min(end, after)])
        for start, end in encoded.lost
        for first, after in source_spans(section)
    )
