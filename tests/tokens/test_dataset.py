"""Every byte of the reports is in train, in held-out, or on the list of what was left out."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.markdown import byte_length
from ft_dagster.corpus.sections import Section
from ft_dagster.recipe import Tokens
from ft_dagster.store import digest
from ft_dagster.tokens import dataset
from ft_dagster.tokens.dataset import balance, prepare_dataset, read_documents, row_documents
from ft_dagster.tokens.documents import render
from ft_dagster.tokens.held_out import Pinned, Split
from ft_dagster.tokens.tokenizer import DocumentTokenizer

BLOCK = Tokens(block_length=16)
HELD_OUT = Split(frozenset({"held"}), Pinned())
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


def section(chapter: str, title: str, level: int, lead: tuple[str, ...], text: str, order: int = 0) -> Section:
    title = title if level else ""
    return Section(chapter, title, level, lead, order, text, f"{chapter}.md", digest([lead, title, level, text]))


def corpus(sections: list[Section], left_out: int = 5) -> dict[str, Any]:
    """The corpus room's report: one file, of which something was left out."""
    size = sum(section.used_bytes for section in sections) + left_out
    return {"files": [{"path": "a.md", "size": size, "left_out": {"heading marks": left_out}}]}


def prepare(
    folder: Path, tokenizer: DocumentTokenizer, sections: list[Section], split: Split = HELD_OUT
) -> dict[str, Any]:
    return prepare_dataset(iter(sections), tokenizer, BLOCK, split, corpus(sections), folder)


def pieces(folder: Path, split: str) -> dict[int, list[list[int]]]:
    """Document -> the token ids of its pieces in order, read back from the rows on disk."""
    found: dict[int, dict[int, list[int]]] = {}
    for row in load_from_disk(str(folder / split)):
        start = 0
        for document, piece, length in zip(row["documents"], row["pieces"], row["lengths"], strict=True):
            assert piece not in found.setdefault(document, {})
            found[document][piece] = row["input_ids"][start : start + length]
            start += length
        assert start == len(row["input_ids"]) <= BLOCK.block_length
    return {document: [parts[place] for place in range(len(parts))] for document, parts in found.items()}


def joined(parts: list[list[int]]) -> list[int]:
    """The tokens of a document: pieces in order, each without its token of context, which it repeats."""
    tokens = list(parts[0])
    for part in parts[1:]:
        assert part[0] == tokens[-1]
        tokens.extend(part[1:])
    return tokens


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_base)


@pytest.fixture
def letters(tmp_path: Path) -> DocumentTokenizer:
    """A tokenizer that knows a, b and blanks, begins texts with `<s>`, and calls all else unknown."""
    folder = tmp_path / "letters"
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", " "])}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return DocumentTokenizer(folder)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.lists(SPEC, max_size=8))
def test_rows_on_disk_give_every_text_back_once(tokenizer: DocumentTokenizer, specs: list[Any]) -> None:
    sections = [section(*spec, order=order) for order, spec in enumerate([FIRST, HELD, *specs])]
    with TemporaryDirectory() as name:
        folder = Path(name)
        about = prepare(folder, tokenizer, sections)
        documents = read_documents(folder)
        sides = {split: pieces(folder, split) for split in ("train", "held_out")}
    assert [(d.chapter, d.title, d.order, d.section) for d in documents] == [
        (s.chapter, s.title, s.order, s.hash) for s in sections
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
        assert about["splits"][split]["pieces"] == sum(len(parts) for parts in found.values())
        assert about["splits"][split]["tokens"] == sum(len(joined(parts)) for parts in found.values())
        # every token but the first of each document is supervised once
        assert about["splits"][split]["supervised_tokens"] == about["splits"][split]["tokens"] - len(found)
    ledger = about["ledger"]
    assert ledger["train"] == sum(s.used_bytes for s in sections if s.chapter != "held")
    assert ledger["held_out"] == sum(s.used_bytes for s in sections if s.chapter == "held")
    assert ledger["left_out"] == {"heading marks": 5}
    assert ledger["bytes_in"] == ledger["train"] + ledger["held_out"] + 5


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.lists(SPEC, max_size=6, unique_by=lambda spec: spec[1:]), data=st.data())
def test_the_version_does_not_depend_on_names_or_order(
    tokenizer: DocumentTokenizer, specs: list[Any], data: st.DataObject
) -> None:
    sections = [section(*spec, order=order) for order, spec in enumerate([FIRST, HELD, *specs])]
    renamed = [
        replace(s, chapter="held" if s.chapter == "held" else f"new/{s.chapter}", source=f"new/{s.source}", order=9)
        for s in data.draw(st.permutations(sections))
    ]
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        before = prepare(Path(one), tokenizer, sections)
        after = prepare(Path(two), tokenizer, renamed)
    assert after["version"] == before["version"]
    assert after["splits"] == before["splits"]


def test_the_version_depends_on_tokens_on_sides_and_on_the_block(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    train, held = section("train", "", 0, (), "Costs fell."), section("held", "", 0, (), "Costs rose.")
    cases = [
        ([train, held], BLOCK),
        ([train, section("held", "", 0, (), "Costs rose!")], BLOCK),
        ([replace(train, chapter="held"), replace(held, chapter="train")], BLOCK),
        ([train, held], Tokens(block_length=17)),
    ]
    versions = []
    for number, (sections, options) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        about = prepare_dataset(sections, tokenizer, options, HELD_OUT, corpus(sections), folder)
        versions.append(about["version"])
    assert len(set(versions)) == len(cases)


def test_the_same_tokens_within_other_boundaries_are_another_version(
    letters: DocumentTokenizer, tmp_path: Path
) -> None:
    letters.prefix, letters.eos_id = [], 3  # a document's end that looks like an "a"
    versions, rows = [], []
    for texts in (["bab"], ["b", "b"]):
        folder = tmp_path / str(len(texts))
        folder.mkdir()
        about = prepare(folder, letters, [*(section("train", "", 0, (), text) for text in texts), section(*HELD)])
        versions.append(about["version"])
        rows.append(load_from_disk(str(folder / "train"))["input_ids"][:])
    assert rows == [[[4, 3, 4, 3]], [[4, 3, 4, 3]]]
    assert versions[0] != versions[1]


def test_the_folder_holds_rows_documents_and_what_was_returned_and_nothing_else(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    sections = [section(*FIRST), section("held", "Costs", 2, (), "They fell.")]
    about = prepare(tmp_path, tokenizer, sections)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "documents.jsonl", "held_out", "train"]
    assert json.loads((tmp_path / "dataset.json").read_bytes()) == about
    assert about["held_out"] == ["held"]
    assert about["block_length"] == 16
    assert [row_documents(tmp_path, split) for split in ("train", "held_out")] == [{0}, {1}]


def test_a_document_longer_than_a_block_is_cut_before_its_heading(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    prepare(tmp_path, tokenizer, [section("train", "", 0, (), "a b c d e\n\n### Next\n\nf g h"), section(*HELD)])
    (parts,) = pieces(tmp_path, "train").values()
    assert [tokenizer.decode(part) for part in parts][:2] == ["a b c d e\n\n", "\n### Next\n\n"]


def test_more_sections_than_a_batch_keep_their_order(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    sections = [section("train", "", 0, (), f"Number {number}.", order=number) for number in range(150)]
    about = prepare(tmp_path, tokenizer, [*sections, section(*HELD, order=150)])
    assert [document.order for document in read_documents(tmp_path)] == list(range(151))
    assert {index: tokenizer.decode(joined(parts)) for index, parts in pieces(tmp_path, "train").items()} == {
        number: f"Number {number}.</s>" for number in range(150)
    }
    train = about["splits"]["train"]
    assert train["fill"] == train["tokens"] / (train["rows"] * 16)


def test_after_a_beginning_token_every_token_of_the_text_is_supervised(
    letters: DocumentTokenizer, tmp_path: Path
) -> None:
    text = "ab ba " * 6
    about = prepare(tmp_path, letters, [section("train", "", 0, (), text), section(*HELD)])
    (parts,) = pieces(tmp_path, "train").values()
    assert joined(parts) == [1, *[{"a": 3, "b": 4, " ": 5}[letter] for letter in text], 2]
    assert about["splits"]["train"]["supervised_tokens"] == len(text) + 1
    document, _ = read_documents(tmp_path)
    assert (document.tokens, document.bytes, document.scored_bytes) == (36, 36, 36)


def test_without_a_beginning_token_the_first_token_is_not_scored(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    prepare(tmp_path, tokenizer, [section("train", "", 0, (), "x"), section("held", "", 0, (), "Zé")])
    assert [(document.tokens, document.bytes, document.scored_bytes) for document in read_documents(tmp_path)] == [
        (1, 1, 0),
        (len(tokenizer.encode(["Zé"])[0].ids), 3, 2),
    ]


def test_bytes_that_the_vocabulary_lacks_are_left_out_by_name(letters: DocumentTokenizer, tmp_path: Path) -> None:
    sections = [section("train", "", 0, (), "ab é"), section("held", "", 0, (), "ab x")]
    assert prepare(tmp_path, letters, sections)["ledger"] == {
        "bytes_in": 14,
        "train": 3,
        "held_out": 3,
        "left_out": {"heading marks": 5, LOST: 3},
    }


def test_heading_marks_that_the_vocabulary_lacks_are_not_left_out_twice(
    letters: DocumentTokenizer, tmp_path: Path
) -> None:
    sections = [section("train", "a", 2, ("# b",), "é"), section(*HELD)]
    assert prepare(tmp_path, letters, sections)["ledger"] == {
        "bytes_in": 11,
        "train": 2,
        "held_out": 2,
        "left_out": {"heading marks": 5, LOST: 2},
    }


@pytest.mark.parametrize(("only", "purpose"), [(HELD, "train on"), (FIRST, "measure the adapter on")])
def test_reports_with_text_on_one_side_only_are_refused(
    tokenizer: DocumentTokenizer, tmp_path: Path, only: Any, purpose: str
) -> None:
    with pytest.raises(CorpusError, match=f"The reports hold no text to {purpose}"):
        prepare(tmp_path, tokenizer, [section(*only)])


def test_a_ledger_that_does_not_balance_is_refused(tokenizer: DocumentTokenizer) -> None:
    report = {"files": [{"size": 10, "left_out": {"draft": 2}}, {"size": 4, "left_out": {"draft": 1}}]}
    assert balance(report, {"train": 11}, {}) == {
        "bytes_in": 14,
        "train": 11,
        "held_out": 0,
        "left_out": {"draft": 3},
    }
    with pytest.raises(LedgerError, match="does not balance: 14 bytes in, 13 accounted for"):
        balance(report, {"train": 9, "held_out": 1}, {})


def test_a_token_that_is_in_no_row_is_noticed(
    tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "pack", lambda lengths, capacity: [[0]])  # a packing that loses pieces
    with pytest.raises(LedgerError, match="train: 46 tokens in documents, 5 in rows"):
        prepare(tmp_path, tokenizer, [section(*FIRST), section(*HELD)])
