"""Every byte of the reports is in train, in held-out, or listed as left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_dagster.config.recipe import Corpus, Tokens
from ft_dagster.corpus import snapshot as snapshot_room
from ft_dagster.corpus.chapter import Chapter, Section
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.shards import group_names
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset import table as table_room
from ft_dagster.dataset.dataset import (
    all_documents,
    dataset_shards,
    load_rows,
    load_shards,
    make_dataset,
    outline_sections,
)
from ft_dagster.dataset.documents import render
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.shard import Known, PackedShard, Teaching, pack_chapters, tokenized_texts
from ft_dagster.dataset.stats import balance
from ft_dagster.dataset.table import PlacedPiece, count_rows, pack_pieces, rows_version
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Artifact, Store, StoreError

BLOCK = Tokens(block_length=16)
HELD_OUT = Split(frozenset({"held"}), Pinned())
SPLITS = ("train", "held_out")
LOST = "not in the tokenizer's vocabulary"
HELD = ("held", "", 0, (), "ab")
FIRST = ("train", "t", 2, (), "The first section of the train side.\n\n### Part\n\nIt goes on.")
SPEC = st.tuples(
    st.sampled_from(["train", "other", "held"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
    st.integers(0, 2),
    st.lists(st.sampled_from(["# Report", "# Überblick"]), max_size=1).map(tuple),
    st.lists(st.sampled_from(["words and ", "\n\n", "\n### Part\n", "</s>", "é🎉", "x"]), min_size=1).map("".join),
)
Make = Callable[..., Artifact]


def section(chapter: str, title: str, level: int, lead: tuple[str, ...], text: str) -> Section:
    title = title if level else ""
    return Section(chapter, title, level, lead, text, f"{chapter}.md", digest([lead, title, level, text]))


def packed(
    tokenizer: DocumentTokenizer, sections: Sequence[Section], split: Split = HELD_OUT, **known: Any
) -> PackedShard:
    chapters = [Chapter(section.chapter, [section]) for section in sections]
    return pack_chapters(chapters, Teaching(tokenizer, BLOCK.block_length), split, Known(known))


def listed(shard: PackedShard, split: str) -> list[dict[str, Any]]:
    return shard.rows[split].to_pylist() if split in shard.rows else []


def versions(shard: PackedShard) -> list[str]:
    return [rows_version(shard.rows.get(split)) for split in SPLITS]


def pieces(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[list[int]]]:
    """Return the token ids of the pieces of each document in order, read back from rows."""
    found: dict[int, dict[int, list[int]]] = {}
    for row in rows:
        start = 0
        for document, piece, length in zip(row["documents"], row["pieces"], row["lengths"], strict=True):
            assert piece not in found.setdefault(document, {})
            found[document][piece] = row["input_ids"][start : start + length]
            start += length
        assert start == len(row["input_ids"]) <= BLOCK.block_length
    return {document: [parts[place] for place in range(len(parts))] for document, parts in found.items()}


def joined(parts: list[list[int]]) -> list[int]:
    """Return the tokens of a document: its pieces in order, each without the repeated token of context."""
    tokens = list(parts[0])
    for part in parts[1:]:
        assert part[0] == tokens[-1]
        tokens.extend(part[1:])
    return tokens


pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


@pytest.fixture
def sections_of(tmp_path: Path) -> Make:
    """Return a function that stores sections of Markdown chapters: `sections_of({"train": "text", "held": "text"})`."""

    def make(chapters: Mapping[str, str]) -> Artifact:
        number = sum(path.name.startswith("reports") for path in tmp_path.iterdir())
        workspace = tmp_path / f"reports {number}"
        (workspace / "chapter_markdowns").mkdir(parents=True)
        for name, text in chapters.items():
            (workspace / "chapter_markdowns" / f"{name}.md").write_text(text, "utf-8")
        return make_sections(take_snapshot(workspace, workspace / "files.db", Store(tmp_path / "store")), Corpus())

    return make


@pytest.fixture
def dataset_of(sections_of: Make, tiny_base: Path) -> Make:
    """Return the dataset of Markdown chapters, of which `held` is held out."""

    def make(chapters: Mapping[str, str], base: Path = tiny_base, options: Tokens = BLOCK) -> Artifact:
        return make_dataset(outline_sections(sections_of(chapters)), base, base.name, options, HELD_OUT)

    return make


# One group of chapters


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.lists(SPEC, max_size=8))
def test_rows_decode_to_every_text_once(tokenizer: DocumentTokenizer, specs: list[Any]) -> None:
    sections = [section(*spec) for spec in [FIRST, HELD, *specs]]
    shard = packed(tokenizer, sections)
    documents = shard.documents
    sides = {split: pieces(listed(shard, split)) for split in SPLITS}
    assert [(d.chapter, d.title, d.source, d.section) for d in documents] == [
        (s.chapter, s.title, s.source, s.hash) for s in sections
    ]
    assert sorted([*sides["train"], *sides["held_out"]]) == list(range(len(sections)))
    for split, found in sides.items():
        for index, parts in found.items():
            tokens = joined(parts)
            assert documents[index].split == split == ("held_out" if sections[index].chapter == "held" else "train")
            assert (tokens.count(tokenizer.eos_id), tokens[-1]) == (1, tokenizer.eos_id)
            assert tokenizer.decode(tokens[:-1]) == render(sections[index])
            assert documents[index].tokens == len(tokens) - 1
            assert documents[index].bytes == byte_length(render(sections[index]))
        counted = count_rows(shard.rows.get(split))
        assert counted["pieces"] == sum(len(parts) for parts in found.values())
        assert counted["tokens"] == sum(len(joined(parts)) for parts in found.values())
        # every token but the first of each document is supervised once
        assert counted["supervised_tokens"] == counted["tokens"] - len(found)
        assert counted["rows"] == len(listed(shard, split))
    assert shard.used == +Counter(
        train=sum(s.used_bytes for s in sections if s.chapter != "held"),
        held_out=sum(s.used_bytes for s in sections if s.chapter == "held"),
    )
    assert shard.left_out == {}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.lists(SPEC, max_size=6, unique_by=lambda spec: spec[1:]), data=st.data())
def test_the_version_does_not_depend_on_names_or_order(
    tokenizer: DocumentTokenizer, specs: list[Any], data: st.DataObject
) -> None:
    sections = [section(*spec) for spec in [FIRST, HELD, *specs]]
    renamed = [
        replace(s, chapter="held" if s.chapter == "held" else f"new/{s.chapter}", source=f"new/{s.source}")
        for s in data.draw(st.permutations(sections))
    ]
    before, after = packed(tokenizer, sections), packed(tokenizer, renamed)
    assert versions(after) == versions(before)
    assert [count_rows(after.rows.get(split)) for split in SPLITS] == [
        count_rows(before.rows.get(split)) for split in SPLITS
    ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.lists(SPEC, max_size=8), known=st.lists(SPEC, max_size=3), share=st.sampled_from(["held", "other"]))
def test_texts_read_from_rows_are_packed_as_if_they_were_tokenized_again(
    tokenizer: DocumentTokenizer, specs: list[Any], known: list[Any], share: str
) -> None:
    sections = [section(*spec) for spec in specs]
    earlier = packed(tokenizer, [section(*spec) for spec in [*specs[::2], *known]])
    split = Split(frozenset({share}), Pinned())
    again = packed(tokenizer, sections, split, **tokenized_texts(earlier.documents, earlier.rows))
    fresh = packed(tokenizer, sections, split)
    assert (again.documents, again.rows, again.used, again.left_out) == (
        fresh.documents,
        fresh.rows,
        fresh.used,
        fresh.left_out,
    )


def test_the_same_tokens_with_other_boundaries_are_another_version(letters: Path) -> None:
    tokenizer = DocumentTokenizer(letters)
    tokenizer.prefix, tokenizer.eos_id = [], 3  # the end of a document, which looks like an "a"
    one, two = (packed(tokenizer, [section("train", "", 0, (), text) for text in texts]) for texts in (["bab"], "bb"))
    assert one.rows["train"]["input_ids"].to_pylist() == two.rows["train"]["input_ids"].to_pylist() == [[4, 3, 4, 3]]
    assert versions(one)[0] != versions(two)[0]


def test_the_same_tokens_with_another_prompt_or_objective_are_another_version() -> None:
    def version(prompt: int, objective: str) -> str:
        return rows_version(pack_pieces([PlacedPiece(("", 0), 0, np.arange(4), prompt, objective)], 16))

    assert len({version(1, "text"), version(2, "text"), version(1, "rewrite")}) == 3


def test_the_same_pieces_in_other_rows_are_another_version(tokenizer: DocumentTokenizer) -> None:
    chapters = [Chapter("train", [section("train", "", 0, (), text) for text in ("a b", "c d")])]
    versions = {
        rows_version(pack_chapters(chapters, Teaching(tokenizer, length), HELD_OUT).rows["train"]) for length in (5, 16)
    }
    assert len(versions) == 2


def test_a_document_longer_than_a_block_is_cut_before_its_heading(tokenizer: DocumentTokenizer) -> None:
    shard = packed(tokenizer, [section("train", "", 0, (), "a b c d e\n\n### Next\n\nf g h")])
    (parts,) = pieces(listed(shard, "train")).values()
    assert [tokenizer.decode(part) for part in parts][:2] == ["a b c d e\n\n", "\n### Next\n\n"]


def test_more_sections_than_a_batch_keep_their_order(tokenizer: DocumentTokenizer) -> None:
    sections = [section("train", str(number), 2, (), f"Number {number}.") for number in range(150)]
    shard = packed(tokenizer, sections)
    assert [document.title for document in shard.documents] == [str(number) for number in range(150)]
    assert {index: tokenizer.decode(joined(parts)) for index, parts in pieces(listed(shard, "train")).items()} == {
        number: f"## {number}\n\nNumber {number}.</s>" for number in range(150)
    }


def test_after_a_beginning_token_every_token_of_the_text_is_supervised(letters: Path) -> None:
    text = "ab ba " * 6
    shard = packed(DocumentTokenizer(letters), [section("train", "", 0, (), text)])
    (parts,) = pieces(listed(shard, "train")).values()
    assert joined(parts) == [1, *[{"a": 3, "b": 4, " ": 5}[letter] for letter in text], 2]
    assert count_rows(shard.rows["train"])["supervised_tokens"] == len(text) + 1
    (document,) = shard.documents
    assert (document.tokens, document.bytes, document.scored_bytes) == (36, 36, 36)


def test_without_a_beginning_token_the_first_token_is_not_scored(tokenizer: DocumentTokenizer) -> None:
    shard = packed(tokenizer, [section("train", "", 0, (), "x"), section("held", "", 0, (), "Zé")])
    assert [(document.tokens, document.bytes, document.scored_bytes) for document in shard.documents] == [
        (1, 1, 0),
        (len(tokenizer.encode(["Zé"])[0].ids), 3, 2),
    ]


def test_a_text_that_is_not_tokenized_losslessly_is_refused_with_its_file_and_section(
    tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: DocumentTokenizer, texts: Sequence[str]) -> list[Any]:
        if any("It goes on" in text for text in texts):
            raise LedgerError("The tokenizer does not reproduce this text")
        return []

    monkeypatch.setattr(DocumentTokenizer, "encode", refuse)
    with pytest.raises(CorpusError, match=r"^train\.md, 't': The .* this text\. Remove these"):
        packed(tokenizer, [section(*FIRST), section(*HELD)])


def test_a_token_that_is_in_no_row_is_detected(tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_room, "pack", lambda lengths, capacity: [[0]])  # a packing that loses pieces
    with pytest.raises(LedgerError, match="train: 46 tokens in documents, 5 in rows"):
        packed(tokenizer, [section(*FIRST), section(*HELD)])


# The complete dataset


def test_the_folder_lists_the_groups_and_the_artifact_describes_their_content(
    sections_of: Make, tiny_base: Path, tokenizer: DocumentTokenizer
) -> None:
    sections = sections_of({"train": "## t\n\nCosts rose.\n", "held": "## Costs\n\nThey fell.\n"})
    made = make_dataset(outline_sections(sections), tiny_base, "tiny", BLOCK, HELD_OUT)
    assert sorted(path.name for path in made.path.iterdir()) == ["artifact.json", "shards.json"]
    assert made.about["held_out"] == ["held"]
    assert made.about["block_length"] == 16
    assert made.about["made_from"] == {"raw_chapters": sections.about["raw_chapters"], "sections": sections.key}
    assert made.about["ledger"] == {
        "bytes_in": 18 + 21,
        "train": len("tCosts rose."),
        "held_out": len("CostsThey fell."),
        "left_out": {"heading marks": 8, "white space": 4},
    }
    assert made.about["checks"] == {"sections on both sides": 0, "rows with documents of the other side": 0}
    documents = list(all_documents(made))
    assert [(d.chapter, d.title, d.split) for d in documents] == [
        ("held", "Costs", "held_out"),
        ("train", "t", "train"),
    ]
    for split, index in (("held_out", 0), ("train", 1)):
        rows = load_rows(made, split)
        counted = made.about["splits"][split]
        assert set(pieces(rows)) == {index}
        tokens = documents[index].tokens + 1
        assert (counted["rows"], counted["tokens"], counted["fill"]) == (len(rows), tokens, tokens / 16)
    assert make_dataset(outline_sections(sections), tiny_base, "tiny", BLOCK, HELD_OUT) == made


def test_the_version_depends_on_tokens_on_sides_and_on_the_block(dataset_of: Make) -> None:
    cases: list[tuple[dict[str, str], Tokens]] = [
        ({"train": "Costs fell.", "held": "Costs rose."}, BLOCK),
        ({"train": "Costs fell.", "held": "Costs rose!"}, BLOCK),
        ({"train": "Costs rose.", "held": "Costs fell."}, BLOCK),
        ({"train": "Costs fell.", "held": "Costs rose."}, Tokens(block_length=17)),
    ]
    versions = [dataset_of(chapters, options=options).about["version"] for chapters, options in cases]
    assert len(set(versions)) == len(cases)


def test_rows_of_several_groups_come_with_the_documents_of_their_own_group(
    sections_of: Make, tiny_base: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_room, "group_names", partial(group_names, limit=2))
    names = [f"c{number}" for number in range(9)]
    sections = sections_of({n: f"## A\n\nThe text of {n}.\n\n## B\n\n{n} has more: é🎉, and so on." for n in names})
    groups = group_names(names, limit=2)
    made = make_dataset(
        outline_sections(sections), tiny_base, "tiny", BLOCK, Split(frozenset({"c1", "c2", "c8"}), Pinned())
    )
    texts = {s.hash: render(s) for chapter in all_chapters(sections) for s in chapter.sections}
    found: Counter[str] = Counter()
    rows_in_order: dict[str, list[Any]] = {}
    for split in SPLITS:
        rows_in_order[split] = []
        for rows, documents in load_shards(made, split):
            assert {document.chapter for document in documents} in [set(group) for group in groups.values()]
            for index, parts in pieces(rows).items():
                assert documents[index].split == split
                assert tokenizer.decode(joined(parts)[:-1]) == texts[documents[index].section]
                found[documents[index].section] += 1
            rows_in_order[split] += rows.to_list()
        assert load_rows(made, split).to_list() == rows_in_order[split]
        assert made.about["splits"][split]["rows"] == len(rows_in_order[split])
        assert made.about["splits"][split]["supervised_tokens"] == sum(
            len(row["input_ids"]) - len(row["lengths"]) for row in rows_in_order[split]
        )
    assert found == dict.fromkeys(texts, 1)
    assert [d.chapter for d in all_documents(made)] == [
        name for group in groups.values() for name in sorted(group) for _ in "AB"
    ]
    assert len(dataset_shards(made)) == len(groups)


def test_a_group_without_text_has_no_rows(dataset_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_room, "group_names", partial(group_names, limit=1))
    made = dataset_of({"train": "a text", "held": "ab", "empty": "", "blank": "\n"})
    assert len(dataset_shards(made)) == 2
    assert sorted(document.chapter for document in all_documents(made)) == ["held", "train"]


def test_damaged_rows_are_named_when_they_are_loaded(dataset_of: Make) -> None:
    made = dataset_of({"train": "a text", "held": "ab"})
    (shard,) = dataset_shards(made)
    path = made.store.blob_path(shard.rows["train"])
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"{path.name} is damaged"):
        load_rows(made, "train")
    assert len(load_rows(made, "held_out")) == 1


def test_bytes_that_the_vocabulary_lacks_are_left_out_and_reported(dataset_of: Make, letters: Path) -> None:
    made = dataset_of({"train": "ab é", "held": "ab x"}, letters)
    assert made.about["ledger"] == {"bytes_in": 9, "train": 3, "held_out": 3, "left_out": {LOST: 3}}
    assert [document.lost_bytes for document in all_documents(made)] == [1, 2]


def test_heading_marks_that_the_vocabulary_lacks_are_not_left_out_twice(dataset_of: Make, letters: Path) -> None:
    ledger = dataset_of({"train": "# b\n\n## a\n\né", "held": "ab"}, letters).about["ledger"]
    assert ledger["left_out"].pop(LOST) == len("é".encode())
    assert ledger == {
        "bytes_in": 15,
        "train": len("ab"),
        "held_out": len("ab"),
        "left_out": {"heading marks": 7, "white space": 2},
    }


@pytest.mark.parametrize(("only", "purpose"), [("held", "train on"), ("train", "measure the adapter on")])
def test_reports_with_only_training_or_only_held_out_text_are_refused(
    dataset_of: Make, only: str, purpose: str
) -> None:
    with pytest.raises(CorpusError, match=f"The reports contain no text to {purpose}"):
        dataset_of({only: "Some text."})


def test_a_ledger_that_does_not_balance_is_refused() -> None:
    corpus = {"bytes_in": 14, "left_out": {"draft": 3}}
    assert balance(corpus, {"train": 9}, {LOST: 2}) == {
        "bytes_in": 14,
        "train": 9,
        "held_out": 0,
        "left_out": {"draft": 3, LOST: 2},
    }
    with pytest.raises(LedgerError, match="does not balance: 14 bytes in, 13 accounted for"):
        balance(corpus, {"train": 9, "held_out": 1}, {})
