"""Measure the time and memory of hostile chapters by their size.

    python benchmarks/hostile.py [--output FILE]

Every row is measured in its own process, which parses the chapter, searches it for secret keys, checks the account of
its bytes and, if it is text, tokenizes and packs it. Memory is the peak resident memory of the process, minus that of a
process with an empty chapter.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ft_dagster.corpus.secrets import chapter_findings
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.shard import Teaching, pack_chapters
from ft_dagster.runtime.machine import processor
from fuzz.invariants import BLOCK, read, tokenizers

PROJECT = Path(__file__).parents[1]
MEGA = 1_000_000
TOKENIZED = 6 * MEGA
"""Size in bytes above which chapters are only read. The small vocabulary makes a token, which takes 270 bytes of
memory, from almost every byte; that of a real base makes one from four bytes."""


def _json(text: str) -> str:
    return json.dumps({"sections": {"A": {"improved": text}}})


CASES: dict[str, tuple[Callable[[int], str], str, tuple[int, ...]]] = {
    # name: (function from size to chapter, unit of the size, sizes)
    "one line of words": (lambda n: "word and more " * (n * MEGA // 14), "MB", (1, 5, 50)),
    "one line without a blank": (lambda n: "a" * (n * MEGA), "MB", (1, 5, 50)),
    "headings": (lambda n: "".join(f"## H{i}\n\nText {i}.\n\n" for i in range(n)), "thousand", (1, 10, 40)),
    "headings without text": (lambda n: "# a\n" * n, "thousand", (1, 10, 40)),
    "quotes in quotes": (lambda n: "> " * n + "a", "depth", (100, 1000, 10_000)),
    "lists in lists": (lambda n: "- " * n + "a", "depth", (100, 1000, 10_000)),
    "brackets that do not close": (lambda n: "[" * (n * MEGA), "MB", (1, 2, 4)),
    "backticks": (lambda n: "`a``" * (n * MEGA // 4), "MB", (1, 2, 4)),
    "emphasis that does not balance": (lambda n: "*a_ " * (n * MEGA // 4), "MB", (1, 2, 4)),
    "HTML comments that do not end": (lambda n: "<!-- " * (n * MEGA // 5), "MB", (1, 2, 4)),
    "tables": (lambda n: "|a|\n|-|\n\n" * (n * MEGA // 9), "MB", (1, 2, 4)),
    "what looks like keys": (lambda n: "eyJ://a:" * (n * MEGA // 8), "MB", (1, 2, 4)),
    "spellings of control tokens": (lambda n: "<|im_end|>[INST]" * (n * MEGA // 16), "MB", (1, 2, 4)),
    "JSON: one long text": (lambda n: _json("word " * (n * MEGA // 5)), "MB", (1, 5, 50)),
    "JSON: lists in lists": (lambda n: "[" * n, "depth", (1000, 100_000, 10_000_000)),
    "JSON: many empty lists": (
        lambda n: '{"sections": {"A": "x"}, "a": [' + "[]," * (n * MEGA // 3) + "1]}",
        "MB",
        (1, 5, 10),
    ),
    "JSON: a number of many digits": (
        lambda n: '{"sections": {}, "a": ' + "9" * n + "}",
        "digits",
        (4000, 40_000, 4_000_000),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "hostile.md")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    idle = in_a_process("headings", 0)["peak"]
    rows: list[dict[str, Any]] = []
    for name, (_, unit, sizes) in CASES.items():
        for size in sizes:
            rows.append({"case": name, "size": f"{size:,} {unit}", **in_a_process(name, size)})
            print(json.dumps(rows[-1]), flush=True)
            options.output.write_text(as_table(rows, idle))


def in_a_process(name: str, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, str(size)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure(name: str, size: int) -> dict[str, Any]:
    """Return CPU seconds, peak memory, and what became of the chapter."""
    make, unit, _ = CASES[name]
    data = make(size * 1000 if unit == "thousand" else size).encode()
    tokenizers()  # set up before the time is measured
    began = time.process_time()
    chapter = read(data, "json" if name.startswith("JSON") else "markdown")
    found = chapter_findings(chapter)
    read_seconds = time.process_time() - began
    if len(data) <= TOKENIZED:
        pack_chapters([chapter], Teaching(tokenizers()[0], BLOCK * 16), Split(frozenset(), Pinned()))
    return {
        "bytes": len(data),
        "read": read_seconds,
        "tokens": time.process_time() - began - read_seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "used": chapter.files[0].used,
        "left_out": sum(chapter.files[0].left_out.values()),
        "findings": len(found),
        "problem": chapter.files[0].problem or "",
    }


def as_table(rows: list[dict[str, Any]], idle: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("markdown-it-py", "detect-secrets", "tokenizers"))
    lines = [
        "# Hostile chapters: time and memory against size",
        "",
        f"`PYTHONPATH=. python benchmarks/hostile.py`, {datetime.now(UTC):%d %B %Y}, {processor()}, {versions}. Each "
        "row is measured in its own process; time is CPU time of all its threads. Reading is parsing, searching for "
        "keys and the account of bytes; every byte of every row is accounted for. Tokens are those of a vocabulary "
        "with little more than single bytes, which is the worst case; if there are none, the chapter was only read.",
        "",
        "| chapter | size | bytes | reading, s | tokens, s | memory, MB | comes to |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        comes_to = f"refused: {row['problem']}" if row["problem"] else f"{row['used']:,} bytes of text"
        tokens = f"{row['tokens']:.2f}" if row["bytes"] <= TOKENIZED and not row["problem"] else ""
        lines.append(
            f"| {row['case']} | {row['size']} | {row['bytes']:,} | {row['read']:.2f} | {tokens} | "
            f"{max(0, row['peak'] - idle) / 1e6:,.0f} | {comes_to} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
