"""The dataset of a refit: all text of another dataset on the train side, nothing held out."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pyarrow as pa

from ft_dagster.dataset.dataset import (
    KIND,
    SHARDS,
    DatasetShard,
    dataset_shards,
    shard_documents,
)
from ft_dagster.dataset.shard import SPLITS, PackedShard, RefusedPair
from ft_dagster.dataset.stats import count_faults, count_pairs, count_split, stats_of
from ft_dagster.dataset.table import read_table, table_stream
from ft_dagster.store.hashing import canonical_json, digest
from ft_dagster.store.local import Artifact

_CODE_VERSION = "1"
"""Increased by hand when the same dataset would result in other rows."""


def dataset_for_refit(dataset: Artifact) -> Artifact:
    """Return the dataset with all rows of `dataset` on the train side, from the store, or made and stored.

    Rows are taken over as they are: nothing is tokenized or packed again, and no token changes its place in a row.

    Args:
        dataset: the dataset that was trained and measured on.

    Returns:
        An artifact like those of `make_dataset`, whose held-out side is empty.
    """
    store = dataset.store
    key = digest(["refit", _CODE_VERSION, dataset.key])
    if found := store.find(KIND, key):
        return found
    shards = dataset_shards(dataset)
    store.fetch_blobs(blob for shard in shards for blob in shard.blobs)
    made = [_all_on_train_side(dataset, shard) for shard in shards]
    stats = [json.loads(store.get_blob(shard.figures)) for shard in made]
    block_length, ledger = dataset.about["block_length"], dataset.about["ledger"]
    about = dict(dataset.about) | {
        "made_by": f"refit of {dataset.about['made_by']}",
        "splits": {name: count_split(name, stats, block_length) for name in SPLITS},
        "version": digest(["refit", dataset.about["version"]]),
        "train_version": digest(["refit", dataset.about["version"]]),
        "held_out": [],
        "pairs": count_pairs(stats),
        "ledger": ledger | {"train": ledger["train"] + ledger["held_out"], "held_out": 0},
        "checks": count_faults(stats),
        "known": 0.0,
    }
    with store.staging() as staging:
        (staging / SHARDS).write_text(json.dumps([asdict(shard) for shard in made], indent=1), "utf-8")
        return store.commit(KIND, key, staging, about)


def _all_on_train_side(dataset: Artifact, shard: DatasetShard) -> DatasetShard:
    store = dataset.store
    before = json.loads(store.get_blob(shard.figures))
    tables = [read_table(store.get_blob(shard.rows[name])) for name in SPLITS if name in shard.rows]
    packed = PackedShard(
        [replace(document, split="train") for document in shard_documents(store, shard)],
        [RefusedPair(**row) for row in before["refused"]],
        {"train": pa.concat_tables(tables)} if tables else {},
        Counter(train=sum(before["used"].values())),
        Counter(before["left_out"]),
    )
    lines = "\n".join(json.dumps(asdict(document), ensure_ascii=False) for document in packed.documents)
    contents = [canonical_json(stats_of(packed)), lines.encode(), *map(table_stream, packed.rows.values())]
    stats, documents, *rows = store.put_blobs(contents)
    return replace(shard, figures=stats, documents=documents, rows=dict(zip(packed.rows, rows, strict=True)))
