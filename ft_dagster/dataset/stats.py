"""What the whole needs to know of a group of chapters without reading its rows, and the sums over all groups."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.dataset.shard import SPLITS, PackedShard
from ft_dagster.dataset.table import count_rows, flat, rows_version

Stats = Mapping[str, Any]
"""Of one group, as plain JSON."""
_PRINT = 16
"""Bytes of a section's hash that it is recognized by."""
_LISTED = 20
"""Pairs that are not taught, listed by name."""


def stats_of(packed: PackedShard) -> dict[str, Any]:
    """The stats of a group."""
    strayed = 0
    for name, table in packed.rows.items():
        owners = np.unique(flat(table, "documents"))
        strayed += sum(packed.documents[index].split != name for index in owners)
    prints = {name: "".join(d.section[: 2 * _PRINT] for d in packed.documents if d.split == name) for name in SPLITS}
    return {
        "splits": {name: count_rows(packed.rows.get(name)) for name in SPLITS},
        "versions": [rows_version(packed.rows.get(name)) for name in SPLITS],
        "used": packed.used,
        "left_out": packed.left_out,
        "pairs": Counter(document.split for document in packed.documents if document.objective == "rewrite"),
        "refused": [asdict(pair) for pair in packed.refused],
        "strayed": strayed,
        "prints": prints,
    }


def has_rows(one: Stats) -> bool:
    """Whether anything of the group is taught."""
    return any(counts["rows"] for counts in one["splits"].values())


def sum_of(stats: Iterable[Stats], name: str) -> Counter[str]:
    """One kind of counts, over all groups."""
    total: Counter[str] = Counter()
    for one in stats:
        total.update(one[name])
    return total


def count_pairs(stats: Sequence[Stats]) -> dict[str, Any]:
    """How many pairs are taught, and why others are not; some of these by name."""
    taught = sum_of(stats, "pairs")
    refused = [row for one in stats for row in one["refused"]]
    reasons = Counter(row["reason"] for row in refused)
    listed = [{name: row[name] for name in ("chapter", "title", "reason", "tokens")} for row in refused[:_LISTED]]
    return {**{name: taught[name] for name in SPLITS}, "left_out": dict(sorted(reasons.items())), "listed": listed}


def count_split(split: str, stats: Iterable[Stats], block_length: int) -> dict[str, Any]:
    """What is in the rows of a split: counts as in `count_rows`, and how much of its slots are taken (`fill`)."""
    total: Counter[str] = Counter()
    for one in stats:
        total.update(one["splits"][split])
    fill = total["slots"] / (total["rows"] * block_length) if total["rows"] else 0.0
    return {**{name: total[name] for name in ("rows", "pieces", "tokens", "supervised_tokens")}, "fill": fill}


def count_faults(stats: Iterable[Stats]) -> dict[str, int]:
    """Facts that the checks of the asset are made of."""
    prints: dict[str, set[str]] = {name: set() for name in SPLITS}
    strayed = 0
    for one in stats:
        strayed += one["strayed"]
        for name, text in one["prints"].items():
            prints[name].update(text[at : at + 2 * _PRINT] for at in range(0, len(text), 2 * _PRINT))
    return {
        "sections on both sides": len(prints["train"] & prints["held_out"]),
        "rows with documents of the other side": strayed,
    }


def balance(corpus: Mapping[str, Any], used: Mapping[str, int], left_out: Mapping[str, int]) -> dict[str, Any]:
    """The ledger of the whole: bytes in = train + held out + left out by reason, in the corpus or here.

    Raises:
        LedgerError: they are not equal.
    """
    reasons = Counter(corpus["left_out"])
    reasons.update(left_out)
    ledger = {
        "bytes_in": corpus["bytes_in"],
        "train": used.get("train", 0),
        "held_out": used.get("held_out", 0),
        "left_out": dict((+reasons).most_common()),
    }
    counted = ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values())
    if counted != ledger["bytes_in"]:
        raise LedgerError(f"The ledger does not balance: {ledger['bytes_in']} bytes in, {counted} accounted for.")
    return ledger
