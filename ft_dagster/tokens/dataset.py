"""The tokenized dataset: packed rows in groups of chapters, and the ledger of every byte.

A group of chapters is up to four blobs: rows of each split (Arrow streams, as Hugging Face datasets reads them),
its documents, and its figures. What an edit does not touch is not written again, and not tokenized again.
"""

import json
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.sections import KIND as SECTIONS
from ft_dagster.corpus.sections import Shard as SectionsShard
from ft_dagster.corpus.sections import all_chapters, chapter_sizes, stored_chapters, stored_shards
from ft_dagster.corpus.shards import overlap
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.recipe import Tokens
from ft_dagster.store import Artifact, Store, canonical_json, digest
from ft_dagster.tokens.held_out import Pinned, Split, choose_held_out
from ft_dagster.tokens.shard import (
    SPLITS,
    Document,
    PackedShard,
    TokenizedText,
    count_rows,
    flat,
    pack_sections,
    rows_version,
    tokenized_texts,
)
from ft_dagster.tokens.tokenizer import DocumentTokenizer

if TYPE_CHECKING:
    from datasets import Dataset

CODE_VERSION = "2"
"""Raised by hand when the same sections would give other rows."""
KIND = "tokenized_dataset"
"""What the store calls it."""
NOT_IN_VOCABULARY = "not in the tokenizer's vocabulary"
_SHARDS = "shards.json"
_PRINT = 16
"""Bytes of a section's hash that it is recognized by."""


@dataclass(frozen=True)
class DatasetShard:
    """The rows of a group of chapters."""

    group: str
    key: str
    """Hash of what it was made from."""
    figures: str
    """Blob: what the whole needs to know of the group, as JSON."""
    documents: str
    """Blob: a Document a line."""
    rows: dict[str, str]
    """Split -> blob; a split without text has none."""

    @property
    def blobs(self) -> list[str]:
        return [self.figures, self.documents, *self.rows.values()]


def choose_split(sections: Artifact, options: Tokens, pinned: Pinned) -> Split:
    """Which chapters are held out. Raises CorpusError if nothing can be."""

    def every_section() -> Iterator[tuple[str, str, int]]:
        for chapter in all_chapters(sections):
            for section in chapter.sections:
                yield chapter.name, section.title, section.used_bytes

    return choose_held_out(chapter_sizes(sections), every_section, options.held_out, pinned)


def dataset_key(sections: Artifact, tokenizer: str, options: Tokens, pinned: Pinned) -> str:
    """The key of a dataset. Sections of equal content are the same sections: their version is in it."""
    pins = [sorted(pinned.held_out), sorted(pinned.train)]
    return digest([sections.about["version"], pins, _made_by(tokenizer, options)])


def make_dataset(sections: Artifact, folder: Path, tokenizer: str, options: Tokens, split: Split) -> Artifact:
    """The dataset of these sections: from the store if it is there, else made from what is there.

    A section is tokenized only if it was not in the dataset that was stored last; a group of chapters is written
    only if it changed.

    Args:
        sections: from the corpus room.
        folder: the base model's, for its tokenizer.
        tokenizer: hash of the tokenizer.
        options: the recipe's part for tokens.
        split: from `choose_split`.

    Returns:
        An artifact whose `about` has `version` (hash of token ids and boundaries), `splits`, `held_out`, `ledger`
        and `checks`.

    Raises:
        CorpusError: a side of the split has no text.
        LedgerError: bytes or tokens do not add up.
    """
    store = sections.store
    key = dataset_key(sections, tokenizer, options, split.pinned)
    if found := store.find(KIND, key):
        return found
    made_by = _made_by(tokenizer, options)
    writer = _Writer(store, DocumentTokenizer(folder), options, split, made_by)
    shards = [shard for source in stored_shards(sections) if (shard := writer.write(source))]
    figures = [json.loads(store.get_blob(shard.figures)) for shard in shards]
    splits = {name: _total(name, figures, options.block_length) for name in SPLITS}
    for name, purpose in zip(SPLITS, ("train on", "measure the adapter on"), strict=True):
        if not splits[name]["rows"]:
            raise CorpusError(f"The reports hold no text to {purpose}. `left out` in the ledger says where it went.")
    used: Counter[str] = Counter()
    for figure in figures:
        used.update(figure["used"])
    about = {
        "made_by": made_by,
        "made_from": {SNAPSHOT: sections.about[SNAPSHOT], SECTIONS: sections.key},
        "block_length": options.block_length,
        "splits": splits,
        "version": digest([options.block_length, [figure["versions"] for figure in figures]]),
        "held_out": sorted(split.held_out),
        "ledger": balance(sections.about, used, sum(figure["lost"] for figure in figures)),
        "checks": _checks(figures),
    }
    with store.staging() as staging:
        (staging / _SHARDS).write_text(json.dumps([asdict(shard) for shard in shards], indent=1), "utf-8")
        return store.take_in(KIND, key, staging, about)


def balance(corpus: Mapping[str, Any], used: Mapping[str, int], lost: int) -> dict[str, Any]:
    """The ledger of the whole: bytes in = train + held out + left out by reason.

    Raises:
        LedgerError: they are not equal.
    """
    left_out = Counter(corpus["left_out"])
    left_out[NOT_IN_VOCABULARY] += lost
    ledger = {
        "bytes_in": corpus["bytes_in"],
        "train": used.get("train", 0),
        "held_out": used.get("held_out", 0),
        "left_out": dict((+left_out).most_common()),
    }
    counted = ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values())
    if counted != ledger["bytes_in"]:
        raise LedgerError(f"The ledger does not balance: {ledger['bytes_in']} bytes in, {counted} accounted for.")
    return ledger


def dataset_shards(dataset: Artifact) -> list[DatasetShard]:
    """The groups that a dataset is stored in."""
    return [DatasetShard(**row) for row in dataset.read_json(_SHARDS)]


def shard_documents(store: Store, shard: DatasetShard) -> list[Document]:
    """The documents of a group, as its rows count them."""
    lines = store.get_blob(shard.documents).decode().split("\n")
    return [Document(**json.loads(line)) for line in lines]


def all_documents(dataset: Artifact) -> Iterator[Document]:
    """All documents, group by group."""
    for shard in dataset_shards(dataset):
        yield from shard_documents(dataset.store, shard)


def held_out_version(dataset: Artifact) -> str:
    """Hash of what adapters are measured on: it stays while only the train side changes."""
    content = []
    for shard in dataset_shards(dataset):
        if "held_out" in shard.rows:
            version = json.loads(dataset.store.get_blob(shard.figures))["versions"][SPLITS.index("held_out")]
            documents = shard_documents(dataset.store, shard)
            content.append([version, [[d.chapter, d.scored_bytes] for d in documents if d.split == "held_out"]])
    return digest(content)


def load_rows(dataset: Artifact, split: str) -> "Dataset":
    """All rows of a split, mapped into memory, their bytes checked."""
    from datasets import concatenate_datasets

    return concatenate_datasets([rows for rows, _ in load_shards(dataset, split)])


def load_shards(dataset: Artifact, split: str) -> Iterator[tuple["Dataset", list[Document]]]:
    """The rows of a split, group by group, with the documents that they count. Raises StoreError if damaged."""
    from datasets import Dataset

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a mapped file is an open file
    for shard in dataset_shards(dataset):
        if blob := shard.rows.get(split):
            dataset.store.get_blob(blob)
            yield Dataset.from_file(str(dataset.store.blob_path(blob))), shard_documents(dataset.store, shard)


class _Writer:
    """Writes groups of one dataset, and takes over what the dataset that was stored last has."""

    def __init__(self, store: Store, tokenizer: DocumentTokenizer, options: Tokens, split: Split, made_by: str) -> None:
        self.store = store
        self.tokenizer = tokenizer
        self.options = options
        self.split = split
        self.made_by = made_by
        before = store.newest(KIND, made_by=made_by)
        self.earlier = dataset_shards(before) if before else []
        self.by_key = {shard.key: shard for shard in self.earlier}

    def write(self, source: SectionsShard) -> DatasetShard | None:
        """The group of these sections; None if it has no text."""
        chapters = json.loads(self.store.get_blob(source.figures))["chapters"]
        units = sorted(self.split.units_of({name for name, *_ in chapters}))
        key = digest([source.lines, source.duplicates, units, self.made_by])
        same = self.by_key.get(key)
        if same and all(self.store.has_blob(blob) for blob in same.blobs):
            return replace(same, group=source.group)
        sections = [section for chapter in stored_chapters(self.store, source) for section in chapter.sections]
        if not sections:
            return None
        wanted = {section.hash for section in sections}
        packed = pack_sections(
            sections, self.tokenizer, self.options.block_length, self.split, self._known(source.group, wanted)
        )
        documents = "\n".join(json.dumps(asdict(document), ensure_ascii=False) for document in packed.documents)
        names = [name for name in SPLITS if name in packed.rows]
        contents = [canonical_json(_figures(packed)), documents.encode()]
        figures, listed, *rows = self.store.put_blobs([*contents, *(_stream(packed.rows[name]) for name in names)])
        return DatasetShard(source.group, key, figures, listed, dict(zip(names, rows, strict=True)))

    def _known(self, group: str, wanted: set[str]) -> dict[str, TokenizedText]:
        known: dict[str, TokenizedText] = {}
        for shard in self.earlier:
            if overlap(shard.group, group) and all(self.store.has_blob(blob) for blob in shard.blobs):
                rows = {name: _table(self.store.get_blob(blob)) for name, blob in shard.rows.items()}
                texts = tokenized_texts(shard_documents(self.store, shard), rows)
                known |= {section: text for section, text in texts.items() if section in wanted}
        return known


def _made_by(tokenizer: str, options: Tokens) -> str:
    return digest([CODE_VERSION, tokenizer, options.model_dump(mode="json")])


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _figures(packed: PackedShard) -> dict[str, Any]:
    strayed = 0
    for name, table in packed.rows.items():
        owners = np.unique(flat(table, "documents"))
        strayed += sum(packed.documents[index].split != name for index in owners)
    prints = {name: "".join(d.section[: 2 * _PRINT] for d in packed.documents if d.split == name) for name in SPLITS}
    return {
        "splits": {name: count_rows(packed.rows.get(name)) for name in SPLITS},
        "versions": [rows_version(packed.rows.get(name)) for name in SPLITS],
        "used": packed.used,
        "lost": packed.lost,
        "strayed": strayed,
        "prints": prints,
    }


def _total(split: str, figures: Iterable[Mapping[str, Any]], block_length: int) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for figure in figures:
        total.update(figure["splits"][split])
    fill = total["slots"] / (total["rows"] * block_length) if total["rows"] else 0.0
    return {**{name: total[name] for name in ("rows", "pieces", "tokens", "supervised_tokens")}, "fill": fill}


def _checks(figures: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Facts that the checks of the asset are made of."""
    prints: dict[str, set[str]] = {name: set() for name in SPLITS}
    strayed = 0
    for figure in figures:
        strayed += figure["strayed"]
        for name, text in figure["prints"].items():
            prints[name].update(text[at : at + 2 * _PRINT] for at in range(0, len(text), 2 * _PRINT))
    return {
        "sections on both sides": len(prints["train"] & prints["held_out"]),
        "rows with documents of the other side": strayed,
    }
