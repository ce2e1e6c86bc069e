"""After an edit, only what changed is tokenized and written again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_workspaces import HELD_OUT, LIMIT, NAMES, OPTIONS, Reports, path_of, rewritten

from ft_dagster.config.recipe import Objectives, Tokens
from ft_dagster.corpus.sections import (
    all_chapters,
)
from ft_dagster.corpus.shards import group_names
from ft_dagster.dataset.chat import CONTROL, ChatTokenizer
from ft_dagster.dataset.dataset import (
    all_documents,
    dataset_shards,
    load_rows,
    load_shards,
    make_dataset,
    outline_sections,
    shard_documents,
)
from ft_dagster.dataset.documents import render
from ft_dagster.dataset.held_out import outline as outline_room
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.held_out.shingles import shingles
from ft_dagster.dataset.rewriting import TOO_LONG
from ft_dagster.dataset.shard import NOT_WHOLE
from ft_dagster.dataset.sides import next_split
from ft_dagster.dataset.tokenizer import DocumentTokenizer, EncodedText
from ft_dagster.store.local import Artifact, Store, StoreError

pytestmark = pytest.mark.usefixtures("small_groups")


@pytest.fixture
def reports(tmp_path: Path, tiny_base: Path) -> Reports:
    """Return reports of twelve chapters with two sections each, in several groups."""
    made = Reports(tmp_path, tiny_base)
    for name in NAMES:
        made.write(name, f"## One\n\nThe text of {name}.\n\n## Two\n\nMore, of {name}.\n")
    return made


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that were tokenized, in order."""
    texts: list[str] = []
    encode = DocumentTokenizer.encode

    def counted(tokenizer: DocumentTokenizer, batch: Sequence[str]) -> list[EncodedText]:
        texts.extend(batch)
        return encode(tokenizer, batch)

    monkeypatch.setattr(DocumentTokenizer, "encode", counted)
    return texts


def blobs_by_chapter(dataset: Artifact) -> dict[str, list[str]]:
    """Return the blobs of each chapter's group."""
    return {
        document.chapter: shard.blobs
        for shard in dataset_shards(dataset)
        for document in shard_documents(dataset.store, shard)
    }


def flip_bit(store: Store, blob: str) -> None:
    path = store.blob_path(blob)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_only_the_section_that_changed_is_tokenized_and_only_its_group_is_written(
    reports: Reports, encoded: list[str]
) -> None:
    before = blobs_by_chapter(reports.dataset())
    assert len(encoded) == 2 * len(NAMES)
    encoded.clear()
    reports.write("c7", "## One\n\nThe text of c7.\n\n## Two\n\nOther text.\n")
    after = blobs_by_chapter(reports.dataset())
    assert encoded == ["## Two\n\nOther text."]
    assert {name for name in NAMES if after[name] != before[name]} == {
        name for name in NAMES if before[name] == before["c7"]
    }


def test_only_changed_pairs_are_rendered_and_unteachable_ones_are_remembered(
    reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = ChatTokenizer.encode

    def counted(chat: ChatTokenizer, batch: Sequence[tuple[str, str]]) -> list[Any]:
        asked.extend(answer.split()[-2] for _, answer in batch)
        return encode(chat, batch)

    monkeypatch.setattr(ChatTokenizer, "encode", counted)
    files = dict(rewritten(name, [("new", "was"), ("new", "was " * 300), ("</s>", "was")]) for name in NAMES)
    reports.put(files)
    options, objectives = Tokens(block_length=200), Objectives(rewrite=1.0)
    assert reports.dataset(HELD_OUT, options, objectives).about["pairs"]["left_out"] == {TOO_LONG: 12, CONTROL: 12}
    assert sorted(asked) == sorted([*NAMES, *NAMES, *NAMES])
    asked.clear()
    reports.put(files | dict([rewritten("c5", [("newer", "was"), ("new", "was " * 300), ("</s>", "was")])]))
    assert reports.dataset(HELD_OUT, options, objectives).about["pairs"]["left_out"] == {TOO_LONG: 12, CONTROL: 12}
    assert asked == ["c5"]


def test_a_pair_that_was_incomplete_is_taught_once_it_is_complete(reports: Reports) -> None:
    files = dict(rewritten(name, [("new", "was")]) for name in ("b", "c2"))
    options, objectives = Tokens(block_length=200), Objectives(rewrite=1.0)
    reports.put(files | {path_of("a"): "## Elsewhere\n\nsub b 0"})
    assert reports.dataset(HELD_OUT, options, objectives).about["pairs"]["left_out"] == {NOT_WHOLE: 1}
    reports.put(files)
    pairs = reports.dataset(HELD_OUT, options, objectives).about["pairs"]
    assert (pairs["train"], pairs["held_out"], pairs["left_out"]) == (1, 1, {})


def test_a_chapter_that_splits_its_group_is_the_only_one_that_is_tokenized(
    reports: Reports, encoded: list[str]
) -> None:
    groups = len(group_names(NAMES, LIMIT))
    name = next(n for n in (f"c{i}" for i in range(100, 200)) if len(group_names([*NAMES, n], LIMIT)) > groups)
    before = blobs_by_chapter(reports.dataset())
    encoded.clear()
    reports.write(name, "A new chapter.")
    after = blobs_by_chapter(reports.dataset())
    assert encoded == ["A new chapter."]
    assert len({shard[0] for shard in after.values()} - {shard[0] for shard in before.values()}) == 2
    assert len({shard[0] for shard in before.values()} - {shard[0] for shard in after.values()}) == 1


def test_deleting_a_chapter_causes_no_tokenization(reports: Reports, encoded: list[str]) -> None:
    reports.dataset()
    encoded.clear()
    (reports.workspace / path_of("c5")).unlink()
    assert {d.chapter for d in all_documents(reports.dataset())} == set(NAMES) - {"c5"}
    assert encoded == []


def test_a_chapter_that_becomes_held_out_is_packed_again_but_not_tokenized_again(
    reports: Reports, encoded: list[str]
) -> None:
    before = blobs_by_chapter(reports.dataset())
    encoded.clear()
    made = reports.dataset(Split(HELD_OUT.held_out | {"c5"}, Pinned(frozenset({"c5"}))))
    after = blobs_by_chapter(made)
    assert encoded == []
    assert {d.chapter for d in all_documents(made) if d.split == "held_out"} == {"c2", "c5", "c7"}
    assert {name for name in NAMES if after[name] != before[name]} == {
        name for name in NAMES if before[name] == before["c5"]
    }


def test_tokens_of_another_tokenizer_or_block_length_are_not_reused(reports: Reports, encoded: list[str]) -> None:
    sections = reports.sections()
    for tokenizer, options in (("one", OPTIONS), ("other", OPTIONS), ("other", Tokens(block_length=17))):
        encoded.clear()
        make_dataset(outline_sections(sections), reports.base, tokenizer, options, HELD_OUT)
        assert len(encoded) == 2 * len(NAMES)


@pytest.mark.parametrize("kind", ["figures", "documents", "train"])
def test_a_group_whose_blob_is_missing_is_made_again_at_the_next_change(
    reports: Reports, encoded: list[str], kind: str
) -> None:
    before = reports.dataset()
    shard = next(s for s in dataset_shards(before) if "c5" in {d.chapter for d in shard_documents(before.store, s)})
    members = {d.chapter for d in shard_documents(before.store, shard)}
    lost = shard.rows["train"] if kind == "train" else getattr(shard, kind)
    reports.store.blob_path(lost).unlink()
    encoded.clear()
    outside = next(name for name in NAMES if name not in members)
    reports.write(outside, "Other text.")
    made = reports.dataset()
    assert "Other text." in encoded and len(encoded) == 1 + 2 * len(members)
    assert reports.store.has_blob(lost)
    assert {d.chapter for d in all_documents(made)} == set(NAMES)
    assert len(load_rows(made, "train")) == made.about["splits"]["train"]["rows"]


def test_missing_blobs_are_made_again_when_the_artifact_folders_are_deleted(reports: Reports) -> None:
    before = reports.dataset()
    shards = dataset_shards(before)
    for blob in shards[0].blobs:
        reports.store.blob_path(blob).unlink()
    for folder in ("raw_chapters", "sections", "tokenized_dataset"):
        shutil.rmtree(reports.store.root / folder)
    again = reports.dataset()
    assert (again.about, dataset_shards(again)) == (before.about, shards)
    assert all(reports.store.has_blob(blob) for shard in shards for blob in shard.blobs)


@pytest.mark.parametrize("kind", ["documents", "train"])
def test_a_damaged_blob_is_named_when_it_is_read_and_its_tokens_are_never_reused(reports: Reports, kind: str) -> None:
    before = reports.dataset()
    shard = next(s for s in dataset_shards(before) if "c5" in {d.chapter for d in shard_documents(before.store, s)})
    damaged = shard.rows["train"] if kind == "train" else getattr(shard, kind)
    flip_bit(reports.store, damaged)
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        list(load_shards(before, "train"))
    reports.write("c5", "Other text.")
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        reports.dataset()


def test_damaged_figures_are_named_when_the_dataset_is_summed_up(reports: Reports) -> None:
    shard = dataset_shards(reports.dataset())[0]
    members = {d.chapter for d in shard_documents(reports.store, shard)}
    flip_bit(reports.store, shard.figures)
    reports.write(next(name for name in NAMES if name not in members), "Other text.")
    with pytest.raises(StoreError, match=f"{shard.figures} is damaged"):
        reports.dataset()


def test_unchanged_sections_are_the_same_dataset_whatever_else_changed(reports: Reports, encoded: list[str]) -> None:
    before = reports.dataset()
    encoded.clear()
    reports.write("c5", "\ufeff## One\r\n\r\n\r\nThe text of c5.  \n\n## Two\n\nMore, of c5.\n\n## References\n\n[1]\n")
    assert reports.dataset() == before
    assert encoded == []


def test_an_edit_that_changes_which_copy_of_a_text_is_used_updates_the_other_group(
    reports: Reports, encoded: list[str]
) -> None:
    assert not any({"c3", "c10"} <= set(group) for group in group_names(NAMES, LIMIT).values())
    reports.write("c3", "Shared.\n\n## Two\n\nOwn of c3.")
    reports.write("c10", "## Ten\n\nShared.\n\n## Two\n\nOwn of c10.")
    before = [(d.chapter, d.title) for d in all_documents(reports.dataset())]
    assert ("c3", "") in before and ("c10", "Ten") not in before
    encoded.clear()
    reports.write("c3", "## Two\n\nOwn of c3.")
    after = [(d.chapter, d.title) for d in all_documents(reports.dataset())]
    assert ("c3", "") not in after and ("c10", "Ten") in after
    assert encoded == ["## Ten\n\nShared."]


def test_rows_after_an_edit_decode_to_every_text(reports: Reports) -> None:
    reports.dataset()
    reports.write("c5", "## One\n\nA text that is longer than a block, so that it is cut in pieces, and another one.")
    reports.write("c13", "New.")
    sections = reports.sections()
    made = reports.dataset()
    tokenizer = DocumentTokenizer(reports.base)
    texts = {s.hash: render(s) for chapter in all_chapters(sections) for s in chapter.sections}
    found = {}
    for split in ("train", "held_out"):
        for rows, documents in load_shards(made, split):
            pieces: dict[tuple[int, int], list[int]] = {}
            for row in rows:
                start = 0
                for document, piece, length in zip(row["documents"], row["pieces"], row["lengths"], strict=True):
                    context = piece > 0
                    pieces[document, piece] = row["input_ids"][start + context : start + length]
                    start += length
            for index, document in enumerate(documents):
                ids = [token for key in sorted(pieces) if key[0] == index for token in pieces[key]]
                if document.split == split:
                    found[document.section] = tokenizer.decode(ids).removesuffix("</s>")
    assert found == texts


def test_only_the_outline_of_a_changed_group_is_made_again(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.dataset()
    read: list[str] = []
    monkeypatch.setattr(outline_room, "shingles", lambda text: read.append(text) or shingles(text))
    reports.write("c5", "## One\n\nAnother text.\n")
    outline = outline_sections(reports.sections())
    mates = next(group for group in group_names(NAMES, LIMIT).values() if "c5" in group)
    assert sorted(read) == sorted(
        ["Another text."] + [t for n in mates if n != "c5" for t in (f"The text of {n}.", f"More, of {n}.")]
    )
    rows = [row for group in outline.groups() for row in group.rows]
    assert {row.chapter for row in rows} == set(NAMES)


# The split of a workspace


def test_the_sides_of_a_dataset_are_kept_by_the_first_split_after_an_upgrade(reports: Reports) -> None:
    last = reports.dataset(Split(frozenset({"c2", "c7", "c9#One"}), Pinned()))
    reports.write("new", "## One\n\nA new chapter.\n")
    split = next_split(outline_sections(reports.sections()), Tokens(held_out=0.01), Pinned(), Objectives(), last, set)
    assert split.held_out == {"c2", "c7", "c9#One"}
    assert split.pinned.train >= {"c1", "c3", "c9#Two"} and split.pinned.share == 0.01
    assert not {"c9", "c2#One"} & split.pinned.train


def test_held_out_text_that_the_adapter_in_use_learned_is_trained_on_after_an_upgrade(reports: Reports) -> None:
    last = reports.dataset()
    (learned,) = {d.section for d in all_documents(last) if (d.chapter, d.title) == ("c7", "Two")}
    outline = outline_sections(reports.sections())
    split = next_split(outline, Tokens(held_out=0.1), Pinned(), Objectives(), last, lambda: {learned})
    assert split.held_out == {"c2", "c7#One"}
    again = next_split(outline, Tokens(held_out=0.1), split.pinned, Objectives(), last, lambda: {learned})
    assert again.held_out == split.held_out


def test_a_renamed_chapter_is_on_its_side_in_the_next_split(reports: Reports) -> None:
    outline = outline_sections(reports.sections())
    first = next_split(outline, Tokens(held_out=0.2), Pinned(), Objectives(), None, set)
    last = reports.dataset(first)
    moved = {name: f"moved-{name}" for name in (min(first.held_out), min(set(NAMES) - first.held_out))}
    for name, new in moved.items():
        (reports.workspace / path_of(name)).rename(reports.workspace / path_of(new))
    outline = outline_sections(reports.sections())
    split = next_split(outline, Tokens(held_out=0.2), first.pinned, Objectives(), last, set)
    assert split.held_out == {moved.get(name, name) for name in first.held_out}
