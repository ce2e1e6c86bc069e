"""After any edits, what is made incrementally equals what would be made from scratch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_workspaces import OPTIONS, Reports, path_of, rewritten

from ft_dagster.config.recipe import Corpus, Objectives, Tokens
from ft_dagster.corpus.chapter import Section, natural_key, read_chapter
from ft_dagster.corpus.files import CorpusError, SourceFile
from ft_dagster.corpus.sections import (
    all_chapters,
    stored_shards,
    unreadable_rows,
)
from ft_dagster.corpus.snapshot import snapshot_files
from ft_dagster.dataset.dataset import all_documents, dataset_shards, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned
from ft_dagster.store.local import Artifact, Store

pytestmark = pytest.mark.usefixtures("small_groups")


# Arbitrary edits

TEXTS = ["one", "two words", "three of them, and a number of tokens more than a block holds", "</s>", "é🎉", "- a\n- b"]
CONTENT = st.lists(st.tuples(st.sampled_from(["A", "B", "References"]), st.sampled_from(TEXTS)), max_size=3)
NAME = st.sampled_from(["a", "b", "c2", "c10", "part/x", "ä"])
EDIT = st.one_of(
    st.tuples(st.just("write"), NAME, CONTENT),
    st.tuples(st.just("delete"), NAME),
    st.tuples(st.just("rename"), NAME, NAME),
    st.tuples(st.just("append the text of"), NAME, NAME),
    st.tuples(st.just("move to JSON"), NAME),
    st.tuples(st.just("add a blank line"), NAME),
    st.tuples(st.just("break"), NAME),
)


def markdown(content: Sequence[tuple[str, str]]) -> str:
    return "".join(f"## {title}\n\n{text}\n\n" for title, text in content)


def edited(files: Mapping[str, str], kind: str, name: str, *rest: Any) -> dict[str, str]:
    """Return the files after an edit, or unchanged if there is nothing to edit."""
    files = dict(files)
    text = files.get(path_of(name))
    if kind == "write":
        files[path_of(name)] = markdown(rest[0])
    elif kind == "break":
        files[f"outputs/consolidated/{name}.json"] = '{"sections":'
    elif text is not None and kind == "append the text of":
        files[path_of(name)] = text + files.get(path_of(rest[0]), "")
    elif text is not None and kind == "add a blank line":
        files[path_of(name)] = text + "\n"
    elif text is not None:
        del files[path_of(name)]
        if kind == "rename":
            files[path_of(rest[0])] = text
        elif kind == "move to JSON":
            parts = [part.partition("\n\n") for part in text.split("## ") if part.strip()]
            content = {title: {"improved": body} for title, _, body in parts}
            files[f"outputs/consolidated/{name}.json"] = json.dumps({"sections": content})
    return files


def sections_by_hand(snapshot_of: Artifact, store: Store) -> dict[str, list[Section]]:
    """Return the expected sections: chapters in natural order, each text kept where it occurs first."""
    files: dict[str, list[SourceFile]] = {}
    for file in snapshot_files(snapshot_of):
        files.setdefault(file.chapter, []).append(file)
    seen: set[str] = set()
    found: dict[str, list[Section]] = {}
    for name in sorted(files, key=natural_key):
        for section in read_chapter(name, files[name], lambda file: store.get_blob(file.sha256), Corpus()).sections:
            if section.text not in seen:
                seen.add(section.text)
                found.setdefault(name, []).append(section)
    return found


def assert_same_sections(made: Artifact, fresh: Artifact) -> None:
    assert (made.key, made.about, unreadable_rows(made)) == (fresh.key, fresh.about, unreadable_rows(fresh))
    assert list(all_chapters(made)) == list(all_chapters(fresh))
    assert [(shard.snapshot, shard.lines, shard.figures, shard.duplicates) for shard in stored_shards(made)] == [
        (shard.snapshot, shard.lines, shard.figures, shard.duplicates) for shard in stored_shards(fresh)
    ]


def assert_same_dataset(made: Artifact, fresh: Artifact) -> None:
    expected = dict(fresh.about)
    if made.about["made_from"] != fresh.about["made_from"]:  # of the same sections, made before
        expected |= {name: made.about[name] for name in ("made_from", "ledger")}
    else:
        assert [shard.blobs for shard in dataset_shards(made)] == [shard.blobs for shard in dataset_shards(fresh)]
    assert (made.key, made.about) == (fresh.key, expected)
    assert [(d.chapter, d.section, d.split) for d in all_documents(made)] == [
        (d.chapter, d.section, d.split) for d in all_documents(fresh)
    ]
    assert [shard.rows for shard in dataset_shards(made)] == [shard.rows for shard in dataset_shards(fresh)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.dictionaries(NAME.map(path_of), CONTENT.map(markdown), max_size=5), edits=st.lists(EDIT, max_size=6))
def test_a_dataset_made_after_edits_equals_one_made_from_scratch(
    tiny_base: Path, first: dict[str, str], edits: list[Any]
) -> None:
    files, pinned = first, Pinned()
    with TemporaryDirectory() as folder:
        reports = Reports(Path(folder), tiny_base)
        for number, edit in enumerate([None, *edits]):
            files = edited(files, *edit) if edit else files
            reports.put(files)
            other = Reports(Path(folder) / f"from nothing {number}", tiny_base)
            other.put(files)
            made, fresh = reports.sections(), other.sections()
            assert_same_sections(made, fresh)
            by_hand = sections_by_hand(reports.store.get("raw_chapters", made.about["raw_chapters"]), reports.store)
            assert {c.name: c.sections for c in all_chapters(made) if c.sections} == by_hand
            try:
                split = choose_split(outline_sections(made), OPTIONS, pinned)
            except CorpusError:  # nothing to hold out
                continue
            assert choose_split(outline_sections(fresh), OPTIONS, pinned) == split
            pinned = split.pinned
            assert_same_dataset(reports.dataset(split), other.dataset(split))


PAIR = st.tuples(
    st.sampled_from(["new", "newer", "</s>"]), st.sampled_from(["was", "was other", "<s>", "was " * 300, None, 5])
)
REWRITTEN = st.one_of(
    st.tuples(st.sampled_from("abcde"), st.lists(PAIR, max_size=3)),
    st.tuples(st.sampled_from("abcde"), st.none()),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.lists(REWRITTEN, min_size=1, max_size=5), text=st.sampled_from([0.0, 1.0]))
def test_pairs_taught_after_edits_equal_those_of_a_dataset_made_from_scratch(
    tiny_base: Path, edits: list[Any], text: float
) -> None:
    options, objectives = Tokens(block_length=200, held_out=0.3), Objectives(text=text, rewrite=1.0)
    files = dict(rewritten(name, [("new", "was"), ("new", "was")]) for name in "abcde")
    files[path_of("prose")] = "Prose.\n\n## Sub 0\n\nsub b 0"
    pinned = Pinned()
    with TemporaryDirectory() as folder:
        reports = Reports(Path(folder), tiny_base)
        for number, edit in enumerate([None, *edits]):
            if edit:
                path, content = rewritten(edit[0], edit[1] or [])
                files |= {path: content}
                if edit[1] is None:
                    del files[path]
            reports.put(files)
            other = Reports(Path(folder) / f"from nothing {number}", tiny_base)
            other.put(files)
            made, fresh = reports.sections(), other.sections()
            assert_same_sections(made, fresh)
            try:
                split = choose_split(outline_sections(made), options, pinned, objectives)
                dataset = reports.dataset(split, options, objectives)
            except CorpusError as error:  # no pair is left on one side
                with pytest.raises(CorpusError, match=re.escape(str(error))):
                    other.dataset(
                        choose_split(outline_sections(fresh), options, pinned, objectives), options, objectives
                    )
                continue
            pinned = split.pinned
            assert_same_dataset(dataset, other.dataset(split, options, objectives))
