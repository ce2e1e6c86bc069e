"""A dataset that teaches rewriting: its ledger, what changes its version, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.config.recipe import Corpus, Objectives, Tokens
from ft_dagster.config.recipe_file import RecipeError
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.dataset.chat import CONTROL
from ft_dagster.dataset.dataset import all_documents, dataset_key, load_rows, make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.rewriting import TOO_LONG
from ft_dagster.dataset.shard import (
    NO_PAIR,
)
from ft_dagster.dataset.sides import next_split
from ft_dagster.store.local import Artifact, Store

PROJECT = Path(__file__).parents[2]
BLOCK = 160
SPLITS = ("train", "held_out")
HELD_OUT = Split(frozenset({"held", "other#B"}), Pinned())
BOTH = Objectives(text=1, rewrite=1)
REWRITE = Objectives(text=0, rewrite=1)

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


Make = Callable[..., Artifact]


@pytest.fixture
def sections_of(tmp_path: Path) -> Make:
    """Return a function that stores sections of reports: `sections_of({"a.json": {...}, "b.md": "text"})`."""

    def make(files: Mapping[str, Any]) -> Artifact:
        workspace = tmp_path / f"reports {sum(path.name.startswith('reports') for path in tmp_path.iterdir())}"
        for name, content in files.items():
            folder = "outputs/consolidated" if name.endswith(".json") else "chapter_markdowns"
            (workspace / folder).mkdir(parents=True, exist_ok=True)
            (workspace / folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return make_sections(take_snapshot(workspace, workspace / "files.db", Store(tmp_path / "store")), Corpus())

    return make


def report(*numbers: int, original: str = "old text") -> dict[str, Any]:
    sections = {f"S{n}": {"original": f"{original} {n}", "improved": f"New text {n}."} for n in numbers}
    return {"sections": sections}


FILES = {"train.json": report(1, 2), "held.json": report(3), "c.md": "## Prose\n\nWithout an original.\n"}
TOKENS = Tokens(block_length=BLOCK, held_out=0.3)


def made(
    sections: Artifact, base: Path, objectives: Objectives, split: Split = HELD_OUT, block: int = BLOCK
) -> Artifact:
    return make_dataset(outline_sections(sections), base, "tiny", Tokens(block_length=block), split, objectives)


@pytest.mark.parametrize("objectives", [Objectives(), BOTH, REWRITE])
def test_the_ledger_of_the_dataset_balances_and_says_what_rewriting_left_out(
    sections_of: Make, tiny_base: Path, objectives: Objectives
) -> None:
    sections = sections_of(FILES)
    dataset = made(sections, tiny_base, objectives)
    pairs, ledger = dataset.about["pairs"], dataset.about["ledger"]
    assert dataset.about["objectives"] == objectives.taught
    assert ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values()) == ledger["bytes_in"]
    assert ledger["held_out"] == len("S3New text 3.")
    rewritten, prose = len("S1New text 1.S2New text 2."), len("ProseWithout an original.")
    assert ledger["train"] == rewritten + (prose if objectives.text else 0)
    assert ledger["left_out"].get(NO_PAIR, 0) == (0 if objectives.text else prose)
    expected = {"train": 2, "held_out": 1} if objectives.rewrite else {"train": 0, "held_out": 0}
    assert pairs == {**expected, "left_out": {}, "listed": []}
    supervised = sum(
        len(row["input_ids"]) - sum(row["prompts"]) for split in SPLITS for row in load_rows(dataset, split)
    )
    assert supervised == sum(side["supervised_tokens"] for side in dataset.about["splits"].values())


def test_pairs_that_are_left_out_are_counted_by_reason_and_named(sections_of: Make, tiny_base: Path) -> None:
    files = FILES | {"long.json": report(8, 9, original="word " * BLOCK), "odd.json": report(7, original="</s>")}
    pairs = made(sections_of(files), tiny_base, BOTH).about["pairs"]
    assert (pairs["train"], pairs["held_out"]) == (2, 1)
    assert pairs["left_out"] == {TOO_LONG: 2, CONTROL: 1}
    listed = {(row["chapter"], row["title"], row["reason"]) for row in pairs["listed"]}
    assert listed == {("long", "S8", TOO_LONG), ("long", "S9", TOO_LONG), ("odd", "S7", CONTROL)}
    assert all((row["tokens"] > BLOCK) == (row["reason"] == TOO_LONG) for row in pairs["listed"])


def test_editing_an_original_changes_the_dataset_only_if_rewriting_is_taught(
    sections_of: Make, tiny_base: Path
) -> None:
    before, after = sections_of(FILES), sections_of(FILES | {"train.json": report(1, 2, original="older text")})
    assert before.about["version"] != after.about["version"]
    for objectives in (Objectives(), BOTH, REWRITE):
        versions = {made(sections, tiny_base, objectives).about["version"] for sections in (before, after)}
        assert len(versions) == (2 if objectives.rewrite else 1)


def test_the_dataset_depends_on_which_objectives_are_taught_and_not_on_their_weights(
    sections_of: Make, tiny_base: Path
) -> None:
    sections = sections_of(FILES)

    def key(**weights: float) -> str:
        return dataset_key(sections, tiny_base, "tiny", TOKENS, HELD_OUT, Objectives(**weights))

    assert key(text=1, rewrite=0.5) == key(text=0.1, rewrite=2)
    assert len({key(), key(rewrite=1), key(text=0, rewrite=1)}) == 3
    versions = {made(sections, tiny_base, objectives).about["version"] for objectives in (Objectives(), BOTH, REWRITE)}
    assert len(versions) == 3


def test_another_template_changes_the_dataset_only_if_rewriting_is_taught(
    sections_of: Make, tiny_base: Path, tmp_path: Path
) -> None:
    sections = sections_of(FILES)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((tiny_base / name).read_bytes())
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    for objectives in (Objectives(), BOTH):
        one, two = (made(sections, folder, objectives) for folder in (tiny_base, other))
        assert (one.key == two.key) == (one.about["version"] == two.about["version"]) == (not objectives.rewrite)


def test_rewriting_alone_holds_out_chapters_that_have_pairs(sections_of: Make) -> None:
    files = {f"c{n}.md": f"## Prose\n\nChapter {n}, with more text than any other one.\n" for n in range(20)}
    sections = sections_of(files | {"x.json": report(1, 2, 3), "y.json": report(4)})
    split = choose_split(outline_sections(sections), Tokens(held_out=0.01), Pinned(), REWRITE)
    assert split.held_out == {"y"}
    assert split.pinned.held_out == {"y"}


@pytest.mark.parametrize("upgraded", [True, False])
def test_a_renamed_report_keeps_the_side_of_its_pairs(sections_of: Make, tiny_base: Path, upgraded: bool) -> None:
    files = {f"r{n}.json": report(3 * n, 3 * n + 1, 3 * n + 2) for n in range(12)}
    first = next_split(outline_sections(sections_of(files)), TOKENS, Pinned(), REWRITE, None, set)
    dataset = made(sections_of(files), tiny_base, REWRITE, first)
    learned = {document.section for document in all_documents(dataset) if document.split == "train"}
    pinned = Pinned() if upgraded else first.pinned
    same = next_split(outline_sections(sections_of(files)), TOKENS, pinned, REWRITE, dataset, lambda: learned)
    assert same.held_out == first.held_out
    renamed = {f"v2 {name}": content for name, content in files.items()}
    split = next_split(outline_sections(sections_of(renamed)), TOKENS, same.pinned, REWRITE, dataset, lambda: learned)
    assert split.held_out == {f"v2 {name}" for name in first.held_out}


def test_with_pairs_of_a_single_chapter_sections_are_held_out(sections_of: Make, tiny_base: Path) -> None:
    sections = sections_of({"x.json": report(1, 2, 3, 4), "c.md": "Prose."})
    split = choose_split(outline_sections(sections), Tokens(held_out=0.01), Pinned(), REWRITE)
    (unit,) = split.held_out
    pairs = made(sections, tiny_base, REWRITE, split).about["pairs"]
    assert unit.startswith("x#S") and (pairs["train"], pairs["held_out"]) == (3, 1)


@pytest.mark.parametrize(("files", "count"), [({"c.md": "Prose."}, 0), ({"c.md": "Prose.", "x.json": report(1)}, 1)])
def test_rewriting_alone_without_pairs_is_refused_and_says_what_reports_must_have(
    sections_of: Make, files: dict[str, Any], count: int
) -> None:
    with pytest.raises(CorpusError) as caught:
        choose_split(outline_sections(sections_of(files)), TOKENS, Pinned(), REWRITE)
    assert str(caught.value) == (
        f"Only objectives.rewrite is taught, and the reports contain {count} pair(s); at least two are needed, one "
        "to train on and one to measure the adapter on. A pair is an `original` beside the `improved` text of a "
        "section, or `final_result.original_text` beside `final_text`, in a JSON file under outputs/consolidated/."
    )


def test_rewriting_alone_without_teachable_pairs_is_refused_with_the_reasons(
    sections_of: Make, tiny_base: Path
) -> None:
    with pytest.raises(CorpusError, match=r"no pair is left to train on\. .*: pair longer than a block: 3\. A pair is"):
        made(sections_of(FILES), tiny_base, REWRITE, block=16)
    one_sided = {"train.json": report(1, 2), "c.md": "Prose."}
    with pytest.raises(CorpusError, match=r"no pair is left to measure the adapter on\. .*: none\. A pair is"):
        made(sections_of(one_sided), tiny_base, REWRITE)


def test_rewriting_on_a_base_without_a_chat_template_is_refused(
    sections_of: Make, tiny_base: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    sections = sections_of(FILES)
    assert made(sections, tmp_path, Objectives()).about["splits"]["train"]["rows"]
    with pytest.raises(RecipeError, match=r"The base model has no chat template .*objectives: .rewrite: 0"):
        made(sections, tmp_path, BOTH)


@pytest.mark.parametrize("objectives", [BOTH, REWRITE])
def test_the_example_report_has_pairs_with_briefs_and_all_of_them_are_taught(
    tiny_base: Path, tmp_path: Path, objectives: Objectives
) -> None:
    sections = make_sections(
        take_snapshot(PROJECT / "ft_dagster" / "examples", tmp_path / "files.db", Store(tmp_path / "store")), Corpus()
    )
    pairs = [pair for chapter in all_chapters(sections) for pair in chapter.pairs]
    assert [(pair.title, len(pair.brief)) for pair in pairs if pair.brief] == [
        ("BACKGROUND KNOWLEDGE", 6),
        ("CURRENT RESEARCH", 7),
    ]
    options = Tokens(block_length=4096, held_out=0.1)
    split = choose_split(outline_sections(sections), options, Pinned(), objectives)
    dataset = make_dataset(outline_sections(sections), tiny_base, "tiny", options, split, objectives)
    found = dataset.about["pairs"]
    assert found["train"] + found["held_out"] == len(pairs) == 7 and found["left_out"] == {}
    documents = [document for document in all_documents(dataset) if document.objective == "rewrite"]
    assert {(d.chapter, d.title) for d in documents} == {
        ("chapter_3", "BACKGROUND KNOWLEDGE"),
        ("chapter_3", "CURRENT RESEARCH"),
        *(("chapter_11", t) for t in ("INTRODUCTION", "METHODOLOGY", "RESULTS", "DISCUSSION", "CONCLUSION")),
    }
