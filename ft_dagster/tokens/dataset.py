"""Sections -> a Hugging Face dataset of packed token rows on disk, and the ledger of every byte."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.corpus.sections import Section
from ft_dagster.recipe import Tokens
from ft_dagster.tokens.documents import find_breaks, render, source_spans
from ft_dagster.tokens.held_out import Split
from ft_dagster.tokens.packing import pack
from ft_dagster.tokens.splitting import cut_positions, split_document
from ft_dagster.tokens.tokenizer import DocumentTokenizer, EncodedText

CODE_VERSION = "1"
"""Raised by hand when the same sections would give other rows."""
SPLITS = ("train", "held_out")
_BATCH = 64
"""Documents tokenized together; all that is in memory of the text at a time."""


@dataclass(frozen=True)
class Document:
    """One section as it went into the dataset."""

    chapter: str
    title: str
    order: int
    section: str
    """The section's content hash."""
    source: str
    split: str
    tokens: int
    """Tokens of the text, without end-of-sequence and beginning-of-sequence tokens."""
    bytes: int
    """UTF-8 bytes of the text as the model reads it, heading marks included."""
    scored_bytes: int
    """Of these, the bytes whose tokens can be predicted: without a beginning-of-sequence token the first cannot."""


@dataclass(frozen=True)
class _Item:
    """One piece of one document, waiting to be packed."""

    order: tuple[str, int]
    """(content of the document, place of the piece in it): an order that no name of a file decides."""
    document: int
    start: int
    """Where its tokens begin in the spool."""
    length: int


class _Side:
    """One side of the split: its tokens go to a spool file at once, so that only their places are in memory."""

    def __init__(self, spool: BinaryIO) -> None:
        self.spool = spool
        self.written = 0
        self.items: list[_Item] = []

    def add(self, ids: list[int], cuts: list[list[int]], block_length: int, content: str, document: int) -> None:
        for place, piece in enumerate(split_document(len(ids), cuts, block_length)):
            start = self.written + piece.first - piece.context
            self.items.append(_Item((content, place), document, start, piece.length))
        self.spool.write(np.asarray(ids, dtype=np.int32).tobytes())
        self.written += len(ids)

    def rows(self, block_length: int) -> Iterator[dict[str, np.ndarray]]:
        """Packed rows; what they are does not depend on names or order of files."""
        self.spool.flush()
        items = sorted(self.items, key=lambda item: item.order)
        tokens = np.memmap(self.spool.name, dtype=np.int32, mode="r")
        for row in pack([item.length for item in items], block_length):
            chosen = [items[index] for index in row]
            yield {
                "input_ids": np.concatenate([tokens[item.start : item.start + item.length] for item in chosen]),
                "lengths": np.asarray([item.length for item in chosen], dtype=np.int32),
                "documents": np.asarray([item.document for item in chosen], dtype=np.int32),
                "pieces": np.asarray([item.order[1] for item in chosen], dtype=np.int32),
            }


def prepare_dataset(
    sections: Iterable[Section],
    tokenizer: DocumentTokenizer,
    options: Tokens,
    split: Split,
    corpus: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Tokenize, split and pack sections into `folder`, and account for every byte of the report files.

    The folder holds `train/` and `held_out/` (each for `datasets.load_from_disk`; a row has `input_ids`, the
    `lengths` of the pieces packed in it, the `documents` they belong to and which of its `pieces` each is),
    `documents.jsonl` (one Document a line, in the order that `documents` counts) and `dataset.json` (what is
    returned).

    Args:
        sections: in reading order; read once, a few at a time.
        tokenizer: of the base model.
        options: the recipe's part for tokens.
        split: which chapters are held out.
        corpus: the corpus room's report, as plain data.
        folder: an empty folder.

    Returns:
        Plain data: `version` (hash of token ids and boundaries), `splits`, `ledger`, `held_out`.

    Raises:
        CorpusError: a side of the split has no text.
        LedgerError: bytes or tokens do not add up.
    """
    used: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    documents: list[Document] = []
    with ExitStack() as stack:
        spools = [stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, suffix=".spool")) for _ in SPLITS]
        sides = {name: _Side(spool) for name, spool in zip(SPLITS, spools, strict=True)}  # type: ignore[arg-type]
        for section, text, encoded in _encoded(sections, tokenizer):
            side = "held_out" if split.holds_out(section.chapter, section.title) else "train"
            ids = [*tokenizer.prefix, *encoded.ids, tokenizer.eos_id]
            offset = len(tokenizer.prefix)
            cuts = [[at + offset for at in kind] for kind in cut_positions(encoded.starts, find_breaks(text))]
            sides[side].add(ids, cuts, options.block_length, section.hash, len(documents))
            lost_bytes = _lost_bytes(section, text, encoded)
            used[side] += section.used_bytes - lost_bytes
            lost["not in the tokenizer's vocabulary"] += lost_bytes
            documents.append(_document(section, side, text, encoded, bool(tokenizer.prefix)))
        for name, purpose in zip(SPLITS, ("train on", "measure the adapter on"), strict=True):
            if not sides[name].items:
                raise CorpusError(
                    f"The reports hold no text to {purpose}. `left out` in the ledger says where it went."
                )
        version = hashlib.sha256(b"%d" % options.block_length)
        splits = {name: _write_rows(sides[name], name, options.block_length, folder, version) for name in SPLITS}
    _check_tokens(documents, splits, len(tokenizer.prefix) + 1)
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents), "utf-8"
    )
    about = {
        "version": version.hexdigest(),
        "block_length": options.block_length,
        "splits": splits,
        "held_out": sorted(split.held_out),
        "ledger": balance(corpus, used, +lost),
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
    return about


def balance(corpus: Mapping[str, Any], used: Mapping[str, int], lost: Mapping[str, int]) -> dict[str, Any]:
    """The ledger of the whole: bytes in = train + held out + left out by reason.

    Raises:
        LedgerError: they are not equal.
    """
    left_out: Counter[str] = Counter(lost)
    for file in corpus["files"]:
        left_out.update(file["left_out"])
    ledger = {
        "bytes_in": sum(file["size"] for file in corpus["files"]),
        "train": used.get("train", 0),
        "held_out": used.get("held_out", 0),
        "left_out": dict(sorted(left_out.items(), key=lambda item: -item[1])),
    }
    counted = ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values())
    if counted != ledger["bytes_in"]:
        raise LedgerError(f"The ledger does not balance: {ledger['bytes_in']} bytes in, {counted} accounted for.")
    return ledger


def _encoded(sections: Iterable[Section], tokenizer: DocumentTokenizer) -> Iterator[tuple[Section, str, EncodedText]]:
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
        yield from zip(batch, texts, encoded, strict=True)


def _lost_bytes(section: Section, text: str, encoded: EncodedText) -> int:
    """Bytes of the source that the vocabulary lacks; heading marks it lacks are counted as marks already."""
    return sum(
        byte_length(text[max(start, first) : min(end, after)])
        for start, end in encoded.lost
        for first, after in source_spans(section)
    )


def _document(section: Section, split: str, text: str, encoded: EncodedText, prefixed: bool) -> Document:
    first_scored = 0 if prefixed else (encoded.starts[1] if len(encoded.starts) > 1 else len(text))
    return Document(
        chapter=section.chapter,
        title=section.title,
        order=section.order,
        section=section.hash,
        source=section.source,
        split=split,
        tokens=len(encoded.ids),
        bytes=byte_length(text),
        scored_bytes=byte_length(text[first_scored:]),
    )


def _write_rows(side: _Side, name: str, block_length: int, folder: Path, version: "hashlib._Hash") -> dict[str, Any]:
    """Write one side as a Hugging Face dataset; its tokens and boundaries go into the version."""
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars

    disable_progress_bars()
    count: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, np.ndarray]]:
        version.update(name.encode())
        for row in side.rows(block_length):
            version.update(b"|" + row["lengths"].tobytes() + row["input_ids"].tobytes())
            count["rows"] += 1
            count["pieces"] += len(row["lengths"])
            count["tokens"] += len(row["input_ids"])
            # The first token of each piece is a document's first or only context: nothing predicts it here.
            count["supervised"] += len(row["input_ids"]) - len(row["lengths"])
            count["context"] += int((row["pieces"] > 0).sum())
            yield row

    columns = ("input_ids", "lengths", "documents", "pieces")
    features = Features({column: Sequence(Value("int32")) for column in columns})
    with tempfile.TemporaryDirectory(dir=folder) as cache:  # a cache of its own: a shared one returns stale rows
        Dataset.from_generator(rows, features=features, cache_dir=cache, fingerprint=name).save_to_disk(folder / name)
    return {
        "rows": count["rows"],
        "pieces": count["pieces"],
        "tokens": count["tokens"] - count["context"],
        "supervised_tokens": count["supervised"],
        "fill": count["tokens"] / (count["rows"] * block_length),
    }


def _check_tokens(documents: Iterable[Document], splits: Mapping[str, Mapping[str, Any]], special: int) -> None:
    """Every token of every document is in a row, once. Raises LedgerError."""
    expected: Counter[str] = Counter()
    for document in documents:
        expected[document.split] += document.tokens + special
    for name in SPLITS:
        if splits[name]["tokens"] != expected[name]:
            raise LedgerError(f"{name}: {expected[name]} tokens in documents, {splits[name]['tokens']} in rows")


def read_documents(folder: Path) -> list[Document]:
    """The documents of a dataset folder, in the order that its rows count them."""
    with (folder / "documents.jsonl").open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def row_documents(folder: Path, split: str) -> set[int]:
    """Which documents (indices into documents.jsonl) have tokens in the rows of a split."""
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / split))
    return {index for documents in rows["documents"] for index in documents}
