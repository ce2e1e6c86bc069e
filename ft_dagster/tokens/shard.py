"""Sections of a group of chapters -> packed rows of tokens, train and held out, without losing one."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa

from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.tokens.documents import find_breaks, render, source_spans
from ft_dagster.tokens.held_out import Split
from ft_dagster.tokens.packing import pack
from ft_dagster.tokens.splitting import cut_positions, split_document
from ft_dagster.tokens.tokenizer import DocumentTokenizer, EncodedText

SPLITS = ("train", "held_out")
_BATCH = 512
"""Documents tokenized together: enough that all cores are busy to the end of most batches."""
_COLUMNS = ("input_ids", "lengths", "documents", "pieces")


@dataclass(frozen=True)
class TokenizedText:
    """The text of one section as tokens. Sections with the same hash have the same."""

    pieces: tuple[np.ndarray, ...]
    """int32, each of at most a block; each but the first begins with a token of context, the last of the one before."""
    tokens: int
    """Tokens of the text, without end-of-sequence, beginning-of-sequence and context tokens."""
    bytes: int
    """UTF-8 bytes of the text as the model reads it, heading marks included."""
    scored_bytes: int
    """Of these, the bytes whose tokens can be predicted: without a beginning-of-sequence token the first cannot."""
    lost_bytes: int
    """Bytes of the source that the vocabulary lacks."""


@dataclass(frozen=True)
class Document:
    """One section as it went into the dataset."""

    chapter: str
    title: str
    section: str
    """The section's content hash."""
    source: str
    split: str
    tokens: int
    bytes: int
    scored_bytes: int
    lost_bytes: int
    """These four as in TokenizedText."""


@dataclass
class PackedShard:
    """The rows of a group of chapters."""

    documents: list[Document] = field(default_factory=list)
    """In reading order within a chapter; the rows count them."""
    rows: dict[str, pa.Table] = field(default_factory=dict)
    """Split -> rows: `input_ids`, the `lengths` of the pieces packed in a row, the `documents` they belong to and
    which of its `pieces` each is; all lists of int32. A split without text has no table."""
    used: Counter[str] = field(default_factory=Counter)
    """Split -> bytes of the reports."""
    lost: int = 0
    """Bytes of the reports that the vocabulary lacks."""


def pack_sections(
    sections: Sequence[Section],
    tokenizer: DocumentTokenizer,
    block_length: int,
    split: Split,
    known: Mapping[str, TokenizedText],
) -> PackedShard:
    """Tokenize what is not known yet, and pack all into rows.

    What the rows are does not depend on names or on the order of sections.

    Args:
        sections: of one group of chapters.
        tokenizer: of the base model.
        block_length: tokens in a row, at most.
        split: which chapters are held out.
        known: section hash -> tokens, from earlier with the same tokenizer and block length.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
        LedgerError: tokens do not add up.
    """
    fresh = [section for section in sections if section.hash not in known]
    texts = {**known, **dict(_tokenized(fresh, tokenizer, block_length))}
    shard = PackedShard()
    pieces: dict[str, list[tuple[tuple[str, int], int, np.ndarray]]] = defaultdict(list)
    for section in sections:
        text = texts[section.hash]
        side = "held_out" if split.holds_out(section.chapter, section.title) else "train"
        index = len(shard.documents)
        pieces[side] += [((section.hash, place), index, ids) for place, ids in enumerate(text.pieces)]
        shard.used[side] += section.used_bytes - text.lost_bytes
        shard.lost += text.lost_bytes
        shard.documents.append(
            Document(
                section.chapter,
                section.title,
                section.hash,
                section.source,
                side,
                text.tokens,
                text.bytes,
                text.scored_bytes,
                text.lost_bytes,
            )
        )
    shard.rows = {side: _pack(pieces[side], block_length) for side in SPLITS if pieces[side]}
    _check_tokens(shard, len(tokenizer.prefix) + 1)
    return shard


def tokenized_texts(documents: Sequence[Document], rows: Mapping[str, pa.Table]) -> dict[str, TokenizedText]:
    """Section hash -> tokens, taken back out of packed rows."""
    pieces: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for table in rows.values():
        ids, lengths, owners, places = (flat(table, column) for column in _COLUMNS)
        ends = np.cumsum(lengths)
        for end, length, owner, place in zip(ends, lengths, owners, places, strict=True):
            pieces[int(owner)][int(place)] = ids[end - length : end]
    return {
        document.section: TokenizedText(
            tuple(pieces[index][place] for place in range(len(pieces[index]))),
            document.tokens,
            document.bytes,
            document.scored_bytes,
            document.lost_bytes,
        )
        for index, document in enumerate(documents)
    }


def flat(table: pa.Table, column: str) -> np.ndarray:
    """All values of a column of lists, one list after the other."""
    return _numpy(table[column].combine_chunks().flatten())


def _numpy(values: pa.Int32Array) -> np.ndarray:
    """Without `to_numpy`, which imports pandas: 0.2 s. The same goes for `_arrow` and `pa.array`."""
    return np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values)]


def _arrow(values: Sequence[int] | np.ndarray) -> pa.Int32Array:
    plain = np.ascontiguousarray(values, dtype=np.int32)
    return pa.Array.from_buffers(pa.int32(), len(plain), [None, pa.py_buffer(plain)])


def count_rows(table: pa.Table | None) -> dict[str, int]:
    """What is in the rows of a split: `rows`, `pieces`, `tokens`, `supervised_tokens`, and `slots` taken in rows."""
    if table is None:
        return {"rows": 0, "pieces": 0, "tokens": 0, "supervised_tokens": 0, "slots": 0}
    slots, pieces = len(flat(table, "input_ids")), len(flat(table, "lengths"))
    context = int((flat(table, "pieces") > 0).sum())
    # The first token of each piece is a document's first or only context: nothing predicts it here.
    return {
        "rows": table.num_rows,
        "pieces": pieces,
        "tokens": slots - context,
        "supervised_tokens": slots - pieces,
        "slots": slots,
    }


def rows_version(table: pa.Table | None) -> str:
    """Hash of token ids and boundaries, row by row; not of the names of documents."""
    version = hashlib.sha256()
    if table is not None:
        ids, lengths = flat(table, "input_ids"), flat(table, "lengths")
        pieces_in_row = np.diff(_numpy(table["lengths"].combine_chunks().offsets))
        for values in (ids, lengths, pieces_in_row):
            version.update(len(values).to_bytes(8) + values.astype("<i4").tobytes())
    return version.hexdigest()


def _tokenized(
    sections: Iterable[Section], tokenizer: DocumentTokenizer, block_length: int
) -> Iterator[tuple[str, TokenizedText]]:
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


def _pack(pieces: list[tuple[tuple[str, int], int, np.ndarray]], block_length: int) -> pa.Table:
    pieces = sorted(pieces, key=lambda piece: piece[0])  # an order that no name of a file decides
    rows = pack([len(ids) for _, _, ids in pieces], block_length)
    chosen = [pieces[index] for row in rows for index in row]
    in_row = [len(row) for row in rows]
    lengths = np.asarray([len(ids) for _, _, ids in chosen], dtype=np.int32)
    slots = np.add.reduceat(lengths, np.cumsum([0, *in_row[:-1]]))
    columns: dict[str, tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]] = {
        "input_ids": (np.concatenate([ids for _, _, ids in chosen]), slots),
        "lengths": (lengths, in_row),
        "documents": ([document for _, document, _ in chosen], in_row),
        "pieces": ([place for (_, place), _, _ in chosen], in_row),
    }
    return pa.table({name: _lists(values, sizes) for name, (values, sizes) in columns.items()})


def _lists(values: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return pa.ListArray.from_arrays(_arrow(offsets), _arrow(values))


def _check_tokens(shard: PackedShard, special: int) -> None:
    """Every token of every document is in a row, once."""
    expected: Counter[str] = Counter()
    for document in shard.documents:
        expected[document.split] += document.tokens + special
    for side in SPLITS:
        found = count_rows(shard.rows.get(side))["tokens"]
        if found != expected[side]:
            raise LedgerError(f"{side}: {expected[side]} tokens in documents, {found} in rows")
