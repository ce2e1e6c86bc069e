"""The stats of a group of chapters, and the totals over all groups, which are computed without reading any rows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.dataset.held_out.choice import FINGERPRINT
from ft_dagster.dataset.shard import SPLITS, PackedShard
from ft_dagster.dataset.table import count_rows, flat, rows_version

Stats = Mapping[str, Any]
"""The stats of one group, as plain JSON data."""
_LISTED = 20
"""Maximum number of pairs that are listed by name if they are not taught."""


def stats_of(packed: PackedShard) -> dict[str, Any]:
    """Return the stats of a group."""
    strayed = 0
    for name, table in packed.rows.items():
        owners = np.unique(flat(table, "documents"))
        strayed += sum(packed.documents[index].split != name for index in owners)
    prints = {name: "".join(d.section[:FINGERPRINT] for d in packed.documents if d.split == name) for name in SPLITS}
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
    """Whether anything in the group is taught."""
    return any(counts["rows"] for counts in one["splits"].values())


def sum_of(stats: Iterable[Stats], name: str) -> Counter[str]:
    """Return the sum of one kind of counts over all groups."""
    total: Counter[str] = Counter()
    for one in stats:
        total.update(one[name])
    return total


def count_pairs(stats: Sequence[Stats]) -> dict[str, Any]:
    """Return how many pairs are taught, and why others are not; the first of these are listed by name."""
    taught = sum_of(stats, "pairs")
    refused = [row for one in stats for row in one["refused"]]
    reasons = Counter(row["reason"] for row in refused)
    listed = [{name: row[name] for name in ("chapter", "title", "reason", "tokens")} for row in refused[:_LISTED]]
    return {**{name: taught[name] for name in SPLITS}, "left_out": dict(sorted(reasons.items())), "listed": listed}


def count_split(split: str, stats: Iterable[Stats], block_length: int) -> dict[str, Any]:
    """Return the counts of a split as in `count_rows`, and the share of its slots that are taken (`fill`)."""
    total: Counter[str] = Counter()
    for one in stats:
        total.update(one["splits"][split])
    fill = total["slots"] / (total["rows"] * block_length) if total["rows"] else 0.0
    return {**{name: total[name] for name in ("rows", "pieces", "tokens", "supervised_tokens")}, "fill": fill}


def count_faults(stats: Iterable[Stats]) -> dict[str, int]:
    """Return the counts that the checks of the asset use."""
    sides: dict[str, set[str]] = {name: set() for name in SPLITS}
    strayed = 0
    for one in stats:
        strayed += one["strayed"]
        for name, found in fingerprints(one).items():
            sides[name] |= found
    return {
        "sections on both sides": len(sides["train"] & sides["held_out"]),
        "rows with documents of the other side": strayed,
    }


def fingerprints(one: Stats) -> dict[str, set[str]]:
    """Return the fingerprints of the sections and pairs of a group, by split."""
    return {
        name: {text[at : at + FINGERPRINT] for at in range(0, len(text), FINGERPRINT)}
        for name, text in one["prints"].items()
    }


def balance(corpus: Mapping[str, Any], used: Mapping[str, int], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Return the ledger of all reports: bytes in = train + held out + left out by reason, in the corpus or here.

    Raises:
        LedgerError: the two sides are not equal.
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
