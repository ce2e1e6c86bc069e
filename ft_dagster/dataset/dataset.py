"""The tokenized dataset: packed rows in groups of chapters, and the ledger of every byte.

Each group of chapters is stored as up to four blobs: the rows of each split (Arrow streams, which Hugging Face datasets
can read), its documents, and its stats. What an edit does not affect is neither tokenized nor written again.
"""

import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_dagster.base.model_folder import chat_template
from ft_dagster.config.recipe import Objectives, Tokens
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.sections import KIND as SECTIONS
from ft_dagster.corpus.sections import SectionShard, stored_chapters
from ft_dagster.corpus.shards import Each, overlap
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.dataset.chat import ChatTokenizer
from ft_dagster.dataset.held_out.choice import NEEDED, TEXT
from ft_dagster.dataset.held_out.near_copies import known_share
from ft_dagster.dataset.held_out.outline import Outline, make_outline, outline_key
from ft_dagster.dataset.held_out.record import Split
from ft_dagster.dataset.rewriting import Refusal
from ft_dagster.dataset.shard import (
    OF_THE_SPLIT,
    SPLITS,
    Document,
    Known,
    Teaching,
    pack_chapters,
    tokenized_texts,
)
from ft_dagster.dataset.stats import (
    Stats,
    balance,
    count_faults,
    count_pairs,
    count_split,
    has_rows,
    stats_of,
    sum_of,
)
from ft_dagster.dataset.table import read_table, table_stream
from ft_dagster.dataset.tokenized import TokenizedText
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact, Store

if TYPE_CHECKING:
    from datasets import Dataset

CODE_VERSION = "3"
"""Increased by hand when the same sections would result in other rows."""
KIND = "tokenized_dataset"
"""The name of this kind of artifact in the store."""
SHARDS = "shards.json"


@dataclass(frozen=True)
class DatasetShard:
    """The stored rows of a group of chapters."""

    group: str
    key: str
    """Hash of everything that the rows were made from."""
    figures: str
    """Blob with the stats of the group as JSON, as in `stats_of`."""
    documents: str
    """Blob with one Document per line."""
    rows: dict[str, str]
    """Split -> blob with its rows. A split without text is missing."""
    outline: str = ""
    """Blob with the outline of the sections; empty in datasets of earlier versions."""
    outline_key: str = ""

    @property
    def blobs(self) -> list[str]:
        """All blobs of the group."""
        return [self.figures, self.documents, *self.rows.values(), *filter(None, [self.outline])]


def dataset_key(
    sections: Artifact,
    folder: Path,
    tokenizer: str,
    options: Tokens,
    split: Split,
    objectives: Objectives = TEXT,
) -> str:
    """Return the key of a dataset. It contains the version of the sections, so equal sections give the same key."""
    made_by = _made_by(folder, tokenizer, options, objectives)
    return digest([sections.about["version"], sorted(split.held_out), made_by])


def make_dataset(
    outline: Outline,
    folder: Path,
    tokenizer: str,
    options: Tokens,
    split: Split,
    objectives: Objectives = TEXT,
    each: Each = map,
) -> Artifact:
    """Return the dataset of these sections, from the store if it is in it; otherwise make and store it.

    A section or a pair is tokenized only if it was not in the dataset that was stored last, and a group of chapters is
    written only if it has changed.

    Args:
        outline: the outline of the sections, as `outline_sections` returns it.
        folder: the folder of the base model, for its tokenizer and chat template.
        tokenizer: the hash of the tokenizer.
        options: the recipe's options for tokens.
        split: the split, as `choose_split` returns it.
        objectives: the recipe's objectives. Only which of them have a weight matters here, not how large it is.
        each: applies a function to each group that is written, in order: `map`, or a function that does so on other
            machines.

    Returns:
        An artifact whose `about` contains `version` (hash of token ids and boundaries), `train_version` (the same of
        the train side alone), `splits`, `held_out`, `usable` bytes of sections, `pairs`, `ledger`, `checks` and
        `known` (the share of the held-out text that the train side contains).

    Raises:
        CorpusError: one side of the split contains nothing that is taught.
        RecipeError: rewriting is taught, and the chat template of the base model cannot be used.
        LedgerError: bytes or tokens do not add up.
    """
    sections = outline.sections
    store = sections.store
    key = dataset_key(sections, folder, tokenizer, options, split, objectives)
    if found := store.find(KIND, key):
        return found
    made_by = _made_by(folder, tokenizer, options, objectives)
    chat = ChatTokenizer(folder) if objectives.rewrite else None
    teaching = Teaching(DocumentTokenizer(folder), options.block_length, bool(objectives.text), chat)
    writer = _Writer(store, teaching, split, made_by)
    wanted = [(source, writer.key(source)) for source, _ in outline.blobs]
    same = {key: known for source, key in wanted if (known := writer.same(source, key))}
    changed = [(source, key) for source, key in wanted if key not in same]
    made: dict[str, DatasetShard | None] = same | {
        key: shard for (_, key), shard in zip(changed, each(writer.write, changed), strict=True)
    }
    shards = [
        replace(shard, group=source.group, outline=blob, outline_key=outline_key(source))
        for (source, key), (_, blob) in zip(wanted, outline.blobs, strict=True)
        if (shard := made[key])
    ]
    store.fetch_blobs(shard.figures for shard in shards)
    stats = [json.loads(store.get_blob(shard.figures)) for shard in shards]
    splits = {name: count_split(name, stats, options.block_length) for name in SPLITS}
    pairs = count_pairs(stats)
    for name, purpose in zip(SPLITS, ("train on", "measure the adapter on"), strict=True):
        if not splits[name]["supervised_tokens"]:
            raise CorpusError(_nothing_to(purpose, objectives, pairs))
    used, left_out = sum_of(stats, "used"), sum_of(stats, "left_out")
    about = {
        "made_by": made_by,
        "made_from": {SNAPSHOT: sections.about[SNAPSHOT], SECTIONS: sections.key},
        "block_length": options.block_length,
        "objectives": objectives.taught,
        "splits": splits,
        "version": digest([options.block_length, [one["versions"] for one in stats if has_rows(one)]]),
        "train_version": _train_version(options.block_length, stats),
        "held_out": sorted(split.held_out),
        "usable": sections.about["used"],
        "pairs": pairs,
        "ledger": balance(sections.about, used, left_out),
        "checks": count_faults(stats),
        "known": known_share(outline, split),
    }
    with store.staging() as staging:
        (staging / SHARDS).write_text(json.dumps([asdict(shard) for shard in shards], indent=1), "utf-8")
        return store.commit(KIND, key, staging, about)


def outline_sections(sections: Artifact, each: Each = map) -> Outline:
    """Return the outline of sections. Only groups that are not in the dataset that was stored last are read."""
    last = sections.store.newest(KIND)
    known = {shard.outline_key: shard.outline for shard in dataset_shards(last) if shard.outline} if last else {}
    return make_outline(sections, known, each)


def dataset_shards(dataset: Artifact) -> list[DatasetShard]:
    """Return the groups that a dataset is stored in."""
    return [DatasetShard(**row) for row in dataset.read_json(SHARDS)]


def shard_documents(store: Store, shard: DatasetShard) -> list[Document]:
    """Return the documents of a group. Its rows contain indices into this list."""
    lines = store.get_blob(shard.documents).decode().split("\n")
    return [Document(**json.loads(line)) for line in lines if line]


def folder_with_rows(dataset: Artifact) -> Path:
    """Return the folder of a dataset for a process that opens it there, after fetching all blobs that it names."""
    dataset.store.fetch(dataset)
    dataset.store.fetch_blobs(blob for shard in dataset_shards(dataset) for blob in shard.blobs)
    return dataset.path


def all_documents(dataset: Artifact) -> Iterator[Document]:
    """Yield all documents, group by group."""
    shards = dataset_shards(dataset)
    dataset.store.fetch_blobs(shard.documents for shard in shards)
    for shard in shards:
        yield from shard_documents(dataset.store, shard)


def train_version(dataset: Artifact) -> str:
    """Return the hash of what adapters are trained on. It stays the same if only the held-out side changes."""
    if known := dataset.about.get("train_version"):
        return str(known)
    shards = dataset_shards(dataset)  # a dataset of an earlier version
    dataset.store.fetch_blobs(shard.figures for shard in shards)
    stats = [json.loads(dataset.store.get_blob(shard.figures)) for shard in shards]
    return _train_version(dataset.about["block_length"], stats)


def _train_version(block_length: int, stats: Sequence[Stats]) -> str:
    train = SPLITS.index("train")
    rows = [one["versions"][train] for one in stats if one["splits"]["train"]["rows"]]
    return digest(["train", block_length, rows])


def held_out_version(dataset: Artifact) -> str:
    """Return the hash of what adapters are measured on. It stays the same while only the train side changes."""
    content = []
    for shard, documents in _held_out_documents(dataset):
        version = json.loads(dataset.store.get_blob(shard.figures))["versions"][SPLITS.index("held_out")]
        content.append([version, [[d.chapter, d.section, d.scored_bytes] for d in documents]])
    return digest(content)


def held_out_sections(dataset: Artifact) -> set[str]:
    """Return the hashes of the held-out sections, and of held-out pairs if pairs are taught."""
    return {document.section for _, documents in _held_out_documents(dataset) for document in documents}


def _held_out_documents(dataset: Artifact) -> Iterator[tuple[DatasetShard, list[Document]]]:
    shards = [shard for shard in dataset_shards(dataset) if "held_out" in shard.rows]
    dataset.store.fetch_blobs(blob for shard in shards for blob in (shard.figures, shard.documents))
    for shard in shards:
        documents = shard_documents(dataset.store, shard)
        yield shard, [document for document in documents if document.split == "held_out"]


def load_rows(dataset: Artifact, split: str) -> "Dataset":
    """Return all rows of a split, mapped into memory, after checking their bytes."""
    from datasets import concatenate_datasets

    return concatenate_datasets([rows for rows, _ in load_shards(dataset, split)])


def load_shards(dataset: Artifact, split: str) -> Iterator[tuple["Dataset", list[Document]]]:
    """Yield the rows of a split, group by group, with the documents that they index. Raises StoreError if damaged."""
    from datasets import Dataset

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each mapped file is an open file
    for shard in dataset_shards(dataset):
        if blob := shard.rows.get(split):
            dataset.store.get_blob(blob)
            yield Dataset.from_file(str(dataset.store.blob_path(blob))), shard_documents(dataset.store, shard)


class _Writer:
    """Writes the groups of one dataset, and reuses what the dataset that was stored last contains."""

    def __init__(self, store: Store, teaching: Teaching, split: Split, made_by: str) -> None:
        self.store = store
        self.teaching = teaching
        self.split = split
        self.made_by = made_by
        before = store.newest(KIND, made_by=made_by)
        self.earlier = dataset_shards(before) if before else []
        self.by_key = {shard.key: shard for shard in self.earlier}

    def key(self, source: SectionShard) -> str:
        """Return the hash of everything that determines the group of these sections."""
        members = json.loads(self.store.get_blob(source.figures))["chapters"]
        units = sorted(self.split.units_of({name for name, *_ in members}))
        return digest([source.lines, source.duplicates, units, self.made_by])

    def same(self, source: SectionShard, key: str) -> DatasetShard | None:
        """Return the stored group if it was made before and its blobs exist; otherwise None."""
        found = self.by_key.get(key)
        return found if found and all(self.store.has_blob(blob) for blob in found.blobs) else None

    def write(self, asked: tuple[SectionShard, str]) -> DatasetShard | None:
        """Write the group of these sections under its key. Return None if the group has no text."""
        source, key = asked
        chapters = [chapter for chapter in stored_chapters(self.store, source) if chapter.sections]
        if not chapters:
            return None
        wanted = {section.hash for chapter in chapters for section in chapter.sections}
        wanted |= {pair.hash for chapter in chapters for pair in chapter.pairs}
        packed = pack_chapters(chapters, self.teaching, self.split, self._known(source.group, wanted))
        documents = "\n".join(json.dumps(asdict(document), ensure_ascii=False) for document in packed.documents)
        names = [name for name in SPLITS if name in packed.rows]
        contents = [canonical_json(stats_of(packed)), documents.encode()]
        stats, listed, *rows = self.store.put_blobs([*contents, *(table_stream(packed.rows[name]) for name in names)])
        return DatasetShard(source.group, key, stats, listed, dict(zip(names, rows, strict=True)))

    def _known(self, group: str, wanted: set[str]) -> Known:
        """Return what the earlier dataset contains of the wanted hashes of sections and pairs."""
        texts: dict[str, TokenizedText] = {}
        refused: dict[str, Refusal] = {}
        for shard in self.earlier:
            if overlap(shard.group, group) and all(self.store.has_blob(blob) for blob in shard.blobs):
                rows = {name: read_table(self.store.get_blob(blob)) for name, blob in shard.rows.items()}
                found = tokenized_texts(shard_documents(self.store, shard), rows)
                texts |= {name: text for name, text in found.items() if name in wanted}
                if self.teaching.chat:
                    for row in json.loads(self.store.get_blob(shard.figures))["refused"]:
                        if row["pair"] in wanted and row["reason"] not in OF_THE_SPLIT:
                            refused[row["pair"]] = Refusal(row["reason"], row["tokens"])
        return Known(texts, refused)


def _made_by(folder: Path, tokenizer: str, options: Tokens, objectives: Objectives) -> str:
    template = digest(chat_template(folder).encode()) if objectives.rewrite else None
    return digest([CODE_VERSION, tokenizer, options.for_keys(), objectives.taught, template])


def _nothing_to(purpose: str, objectives: Objectives, pairs: Mapping[str, Any]) -> str:
    if objectives.text:
        return f"The reports contain no text to {purpose}. `left out` in the ledger shows where it went."
    reasons = ", ".join(f"{reason}: {count}" for reason, count in pairs["left_out"].items()) or "none"
    return (
        f"Only objectives.rewrite is taught, and no pair is left to {purpose}. Pairs left out by reason: "
        f"{reasons}. {NEEDED}; a pair that is longer than a block needs a larger tokens.block_length."
    )
