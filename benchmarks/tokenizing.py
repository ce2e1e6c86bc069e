"""Measure how fast text becomes packed rows on disk, compared with `datasets.map` and the same tokenizer.

    python benchmarks/tokenizing.py --reports FOLDER

The table has three rows. `datasets.map` tokenizes texts in memory and writes their tokens to an Arrow file. "Tokenized"
is our tokenizer on the same texts, where every text is decoded again and compared. "Whole dataset" is the stage, in
which sections are read from the store, tokenized, decoded again, cut at headings and paragraphs, packed, accounted for
to the byte, written as Arrow and hashed. Each loads its tokenizer again in each round. They alternate in one process,
after a warm-up round; the table shows medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.corpus import write_chapters
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Corpus, Tokens
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.documents import render
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.store.local import Store

PROJECT = Path(__file__).parents[1]
ROUNDS = 5
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=PROJECT / "ft_dagster" / "examples" / "chapter_markdowns")
    parser.add_argument("--chapters", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "tokenizing.md")
    options = parser.parse_args()

    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoTokenizer

    disable_caching()
    disable_progress_bars()
    base = prepare_base(load_recipe("smollm2-135m").base, Settings().cache)
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch)
        write_chapters(options.reports, workspace, options.chapters)
        snapshot = take_snapshot(workspace, workspace / "files.db", Store(workspace / "store"))
        sections = make_sections(snapshot, Corpus())
        found: list[Section] = [section for chapter in all_chapters(sections) for section in chapter.sections]
        texts = [render(section) for section in found]
        size = sum(len(text.encode()) for text in texts) / 1e6
        rows = Dataset.from_dict({"text": texts})
        split = choose_split(outline_sections(sections), Tokens(), Pinned())
        round_number = 0

        def tokenized() -> None:
            ours = DocumentTokenizer(Path(base.folder))
            for first in range(0, len(texts), BATCH):
                for found in ours.encode(texts[first : first + BATCH]):
                    np.asarray(found.ids, dtype=np.int32)

        def whole() -> None:
            nonlocal round_number
            round_number += 1  # a different block length in each round, so that nothing is reused from the one before
            options = Tokens(block_length=512 + round_number)
            made = make_dataset(outline_sections(sections), Path(base.folder), base.tokenizer, options, split)
            assert made.about["splits"]["train"]["rows"]

        def theirs() -> None:
            tokenizer = AutoTokenizer.from_pretrained(base.folder)
            rows.map(
                lambda batch: tokenizer(batch["text"], add_special_tokens=False),
                batched=True,
                remove_columns=["text"],
                cache_file_name=str(workspace / "theirs.arrow"),
            )

        works = {"datasets.map": theirs, "ours, tokenized": tokenized, "ours, whole dataset": whole}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for number in range(ROUNDS + 1):
            for name, work in works.items():
                taken = timed(work)
                if number:
                    times[name].append(taken)
    lines = ["| | MB/s | MB per CPU-s | times `datasets.map` | by CPU-s |", "|---|---:|---:|---:|---:|"]
    usual = [statistics.median(column) for column in zip(*times["datasets.map"], strict=True)]
    for name, taken in times.items():
        seconds, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        speed = f"{size / seconds:.2f} | {size / cpu:.2f} | {usual[0] / seconds:.2f} | {usual[1] / cpu:.2f}"
        lines.append(f"| {name} | {speed} |")
    about = (
        f"# Tokenizing\n\n{len(texts):,} sections, {size:.1f} MB, recombined from real ones; tokenizer of "
        f"SmolLM2-135M; {ROUNDS} alternated rounds, medians, {os.cpu_count()} cores. `datasets.map` tokenizes and "
        "writes tokens. Ours also decodes every text again and compares it; the whole dataset is also cut, packed, "
        "accounted for to the byte, and hashed.\n\n"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(about + "\n".join(lines) + "\n")
    print(about + "\n".join(lines))


def timed(work: Callable[[], None]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


if __name__ == "__main__":
    main()
