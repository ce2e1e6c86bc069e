"""Reads sections of report files given in a test through a store, and checks every byte account."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.chapter import Section
from ft_dagster.corpus.files import Kind, SourceFile, Unreadable
from ft_dagster.corpus.index import Scan
from ft_dagster.corpus.ledger import FileLedger
from ft_dagster.corpus.pairs import Pair
from ft_dagster.corpus.report_json import describe_content
from ft_dagster.corpus.sections import all_chapters, make_sections, unreadable_rows
from ft_dagster.corpus.snapshot import write_snapshot
from ft_dagster.dataset.held_out.outline import make_outline
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Store

Content = str | bytes | dict[str, Any]


@dataclass
class Made:
    """What was made of reports: the chapters as they were stored, and the metadata of all of them."""

    sections: list[Section]
    pairs: list[Pair]
    files: list[FileLedger]
    unreadable: list[dict[str, Any]]
    about: Mapping[str, Any]


def source_file(name: str, data: bytes) -> SourceFile:
    kind: Kind = "json" if name.endswith(".json") else "markdown"
    path = ("outputs/consolidated/" if kind == "json" else "chapter_markdowns/") + name
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return SourceFile(path, stem, kind, len(data), digest(data), *describe_content(kind, stem, data))


def read(files: Mapping[str, Content], *unreadable: Unreadable, **options: Any) -> Made:
    """Read sections of files given as {name with suffix: text, bytes or JSON content}."""
    sources = []
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for name, content in files.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            store.put_blobs([data])
            sources.append(source_file(name, data))
        made = make_sections(write_snapshot(Scan(sources, list(unreadable)), store), Corpus(**options))
        chapters = list(all_chapters(made))
        outlined = [chapter for group in make_outline(made).groups() for chapter in group.chapters]
        sizes = {chapter.name: chapter.size for chapter in outlined if chapter.size}
        sizes_in_pairs = {chapter.name: chapter.size_in_pairs for chapter in outlined if chapter.size_in_pairs}
        rows = unreadable_rows(made)
    found = Made(
        [section for chapter in chapters for section in chapter.sections],
        [pair for chapter in chapters for pair in chapter.pairs],
        [ledger for chapter in chapters for ledger in chapter.files],
        rows,
        made.about,
    )
    for ledger in found.files:
        ledger.check()
    used: Counter[str] = Counter()
    for section in found.sections:
        used[section.chapter] += section.used_bytes
    assert sizes == +used
    in_pairs: Counter[str] = Counter()
    for chapter in chapters:
        places = [place for pair in chapter.pairs if pair.whole for place in pair.sections]
        assert len(set(places)) == len(places)
        in_pairs[chapter.name] = sum(chapter.sections[place].used_bytes for place in places)
        for pair in chapter.pairs:
            text = "\n\n".join(chapter.sections[place].markdown for place in pair.sections)
            assert (pair.improved == text) == pair.whole
            assert pair.original not in ("", pair.improved)
    assert sizes_in_pairs == +in_pairs
    assert made.about["pairs"] == sum(pair.whole for pair in found.pairs)
    left_out = Counter({"unreadable file": sum(item.size for item in unreadable)})
    left_out = sum((ledger.left_out for ledger in found.files), left_out)
    assert {name: made.about[name] for name in ("used", "left_out", "bytes_in", "sections", "words", "chapters")} == {
        "used": used.total(),
        "left_out": dict(+left_out),
        "bytes_in": sum(file.size for file in sources) + sum(item.size for item in unreadable),
        "sections": len(found.sections),
        "words": sum(len(section.text.split()) for section in found.sections),
        "chapters": len({section.chapter for section in found.sections}),
    }
    assert used.total() == sum(ledger.used for ledger in found.files)
    assert made.about["removed"] == dict(sum((chapter.removed for chapter in chapters), Counter()))
    return found


def texts(files: dict[str, Content], **options: Any) -> list[tuple[str, str, str]]:
    """Return (chapter, title, text) of each section."""
    return [(section.chapter, section.title, section.text) for section in read(files, **options).sections]


def removed(files: dict[str, Content], **options: Any) -> dict[str, int]:
    return dict(read(files, **options).about["removed"])


def version(files: dict[str, Content], **options: Any) -> str:
    return str(read(files, **options).about["version"])


def reviewed(
    chapter: int | str,
    title: str,
    text: str,
    timestamp: str = "2025",
    score: float | None = None,
    original: Any = None,
    points: Sequence[Any] = (),
) -> dict[str, Any]:
    """Return one reviewed section (shape 2c); `points` are those of each iteration."""
    iterations = [{"improvement_points": found} for found in points]
    scores = [] if score is None else [{"panel_scores": {"clarity": score}}]
    return {
        "metadata": {"chapter": chapter, "section": title, "timestamp": timestamp},
        "iterations": [*iterations, *scores],
        "final_result": {"original_text": original, "final_text": text, "final_status": "improved"},
    }


def draft(**sections: str) -> dict[str, Any]:
    return {"question": "Why?", "timestamp": "2025", "sections": sections}
