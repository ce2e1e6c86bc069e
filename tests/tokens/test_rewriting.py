"""Pairs as exchanges: each taught whole or left out for a reason, and every byte still accounted for."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.chapter import Chapter, Section
from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.pairs import Pair
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.recipe import Corpus, Objectives, RecipeError, Tokens
from ft_dagster.store import Artifact, Store, digest
from ft_dagster.tokens.chat import CONTROL, ChatTokenizer, EncodedExchange
from ft_dagster.tokens.dataset import all_documents, choose_split, dataset_key, load_rows, make_dataset
from ft_dagster.tokens.held_out import Pinned, Split
from ft_dagster.tokens.rewriting import INSTRUCTION, TOO_LONG, Refusal, request_text
from ft_dagster.tokens.shard import (
    BOTH_SIDES,
    NO_PAIR,
    NOT_WHOLE,
    OF_THE_SPLIT,
    Known,
    PackedShard,
    RefusedPair,
    Teaching,
    pack_chapters,
    tokenized_texts,
)
from ft_dagster.tokens.table import OBJECTIVES
from ft_dagster.tokens.tokenizer import DocumentTokenizer

PROJECT = Path(__file__).parents[2]
BLOCK = 160
SPLITS = ("train", "held_out")
HELD_OUT = Split(frozenset({"held", "other#B"}), Pinned())
BOTH = Objectives(text=1, rewrite=1)
REWRITE = Objectives(text=0, rewrite=1)

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


@pytest.fixture(scope="session")
def chat(tiny_base: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_base)


def section(chapter: str, title: str, text: str) -> Section:
    return Section(chapter, title, 2, (), text, f"{chapter}.json", digest([title, text]))


def chapter(name: str, *parts: tuple[str, str], pairs: Sequence[tuple[int, ...]] = (), **options: Any) -> Chapter:
    """A chapter of (title, text) with pairs of some of its sections; `options` are those of each pair."""
    sections = [section(name, title, text) for title, text in parts]
    made = [
        Pair(
            sections[places[0]].title,
            options.get("original", f"was: {sections[places[0]].text}"),
            "\n\n".join(sections[place].markdown for place in places),
            options.get("brief", ()),
            f"{name}.json",
            places,
            options.get("whole", True),
        )
        for places in pairs
    ]
    return Chapter(name, sections, made)


def pack(
    chapters: Sequence[Chapter],
    tokenizer: DocumentTokenizer,
    chat: ChatTokenizer | None,
    text: bool = False,
    split: Split = HELD_OUT,
    known: Known | None = None,
) -> PackedShard:
    return pack_chapters(chapters, Teaching(tokenizer, BLOCK, text, chat), split, known)


def exchanges(shard: PackedShard) -> dict[str, tuple[list[int], list[int]]]:
    """Hash of a pair -> what is read of its piece, and what is supervised."""
    found = {}
    for table in shard.rows.values():
        for row in table.to_pylist():
            start = 0
            columns = (row[name] for name in ("documents", "pieces", "lengths", "prompts", "objectives"))
            for document, piece, length, prompt, objective in zip(*columns, strict=True):
                ids = row["input_ids"][start : start + length]
                assert shard.documents[document].objective == OBJECTIVES[objective]
                if OBJECTIVES[objective] == "rewrite":
                    assert piece == 0 and shard.documents[document].section not in found
                    found[shard.documents[document].section] = (ids[:prompt], ids[prompt:])
                start += length
    return found


def test_a_request_is_the_instruction_the_points_and_the_original() -> None:
    (pair,) = chapter("a", ("A", "new"), pairs=[(0,)], original="## A\n\nold", brief=("one", "two")).pairs
    assert request_text(pair) == f"{INSTRUCTION}\n\nImprove these points:\n- one\n- two\n\n## A\n\nold"
    (plain,) = chapter("a", ("A", "new"), pairs=[(0,)], original="## A\n\nold").pairs
    assert request_text(plain) == f"{INSTRUCTION}\n\n## A\n\nold"


def test_a_pair_is_one_piece_whose_answer_alone_is_supervised(
    tokenizer: DocumentTokenizer, chat: ChatTokenizer
) -> None:
    made = chapter("train", ("A", "new one"), ("B", "new two"), pairs=[(0, 1)])
    shard = pack([made], tokenizer, chat)
    (pair,) = made.pairs
    prompt, answer = exchanges(shard)[pair.hash]
    assert tokenizer.decode(prompt) == f"[user] {request_text(pair)}</s>"
    assert tokenizer.decode(answer) == "[assistant] ## A\n\nnew one\n\n## B\n\nnew two</s>"
    (document,) = shard.documents
    assert (document.objective, document.title, document.section) == ("rewrite", "A", pair.hash)
    assert (document.prompt, document.tokens) == (len(prompt), len(answer) - 1)
    assert document.bytes == document.scored_bytes == len("[assistant] ## A\n\nnew one\n\n## B\n\nnew two")
    assert shard.used == {"train": len("Anew oneBnew two")}


def test_where_sections_are_taught_too_pairs_add_no_bytes(tokenizer: DocumentTokenizer, chat: ChatTokenizer) -> None:
    made = [
        chapter("train", ("A", "new one"), ("B", "plain"), pairs=[(0,)]),
        chapter("held", ("C", "new two"), pairs=[(0,)]),
    ]
    both, text = pack(made, tokenizer, chat, text=True), pack(made, tokenizer, None, text=True)
    assert (both.used, both.left_out) == (text.used, text.left_out)
    assert [(d.chapter, d.objective) for d in both.documents] == [
        ("train", "text"),
        ("train", "text"),
        ("train", "rewrite"),
        ("held", "text"),
        ("held", "rewrite"),
    ]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (chapter("train", ("A", "</s>"), pairs=[(0,)]), CONTROL),
        (chapter("train", ("A", "new"), pairs=[(0,)], original="<unk>"), CONTROL),
        (chapter("train", ("A", "new"), pairs=[(0,)], brief=("a <s>",)), CONTROL),
        (chapter("train", ("A", "word " * BLOCK), pairs=[(0,)]), TOO_LONG),
        (chapter("train", ("A", "new"), pairs=[(0,)], whole=False), NOT_WHOLE),
        (chapter("other", ("A", "one"), ("B", "two"), pairs=[(0, 1)]), BOTH_SIDES),
    ],
)
def test_a_pair_that_cannot_be_taught_is_left_out_by_name_and_its_bytes_with_it(
    tokenizer: DocumentTokenizer, chat: ChatTokenizer, made: Chapter, reason: str
) -> None:
    good = chapter("train", ("Good", "good"), ("Plain", "plain"), pairs=[(0,)])
    shard = pack([made, good], tokenizer, chat)
    (refused,) = shard.refused
    assert refused == RefusedPair(made.name, "A", made.pairs[0].hash, reason, refused.tokens)
    assert (refused.tokens > BLOCK) == (reason == TOO_LONG)
    assert [document.title for document in shard.documents] == ["Good"]
    assert shard.left_out == {reason: sum(s.used_bytes for s in made.sections), NO_PAIR: len("Plainplain")}
    assert shard.used == {"train": len("Goodgood")}
    both = pack([made, good], tokenizer, chat, text=True)
    assert both.refused == shard.refused and both.left_out == {}
    assert both.used.total() == sum(s.used_bytes for c in (made, good) for s in c.sections)


TEXTS = st.sampled_from(["one", "two words", "é🎉 " * 9, "</s>", "word " * 200, "- a\n- b"])
ORIGINAL = st.one_of(st.none(), st.sampled_from(["was", "<s>", "was " * 200, "é"]))
PART = st.tuples(TEXTS, st.integers(1, 2), ORIGINAL, st.booleans())
CHAPTERS = st.lists(st.tuples(st.sampled_from(["train", "held", "other"]), st.lists(PART, max_size=3)), max_size=4)


def chapters_of(specs: Sequence[tuple[str, Sequence[tuple[str, int, str | None, bool]]]]) -> list[Chapter]:
    """Chapters of parts: text, how many sections it makes, its original, and whether it is whole."""
    made: list[Chapter] = []
    for number, (name, parts) in enumerate(specs):
        found = Chapter(name)
        for place, (text, count, original, whole) in enumerate(parts):
            first = len(found.sections)
            found.sections += [
                section(name, "AB"[n % 2], f"{number}.{place}.{n} {text}") for n in range(first, first + count)
            ]
            if original is not None:
                places = tuple(range(first, first + count))
                improved = "\n\n".join(found.sections[at].markdown for at in places)
                found.pairs.append(Pair("T", original, improved, ("point",), f"{name}.json", places, whole))
        made.append(found)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=CHAPTERS, text=st.booleans(), with_pairs=st.booleans())
def test_whatever_is_taught_every_byte_is_accounted_for_and_every_answer_is_supervised_once(
    tokenizer: DocumentTokenizer, chat: ChatTokenizer, specs: Any, text: bool, with_pairs: bool
) -> None:
    made = chapters_of(specs)
    shard = pack(made, tokenizer, chat if with_pairs else None, text)  # counts tokens
    sizes: Counter[str] = Counter()
    for item in made:
        for part in item.sections:
            sizes["held_out" if HELD_OUT.holds_out(item.name, part.title) else "train"] += part.used_bytes
    assert all(shard.used[side] <= sizes[side] for side in SPLITS)
    assert not text or shard.used == sizes
    if text or with_pairs:
        assert shard.used.total() + shard.left_out.total() == sizes.total()
    pairs = {pair.hash: pair for item in made for pair in item.pairs} if with_pairs else {}
    taught = exchanges(shard)
    assert Counter([*taught, *(refused.pair for refused in shard.refused)]) == Counter(list(pairs))
    for name, (prompt, answer) in taught.items():
        (encoded,) = chat.encode([(request_text(pairs[name]), pairs[name].improved)])
        assert isinstance(encoded, EncodedExchange)
        assert (prompt, answer) == (encoded.prompt, encoded.answer)
        assert answer.count(tokenizer.eos_id) == 1 and answer[-1] == tokenizer.eos_id
    refused = {item.pair: Refusal(item.reason, item.tokens) for item in shard.refused}
    refused = {name: found for name, found in refused.items() if found.reason not in OF_THE_SPLIT}
    known = Known(tokenized_texts(shard.documents, shard.rows), refused)
    again = pack(made, tokenizer, chat if with_pairs else None, text, known=known)
    assert (again.documents, again.rows, again.refused) == (shard.documents, shard.rows, shard.refused)
    assert (again.used, again.left_out) == (shard.used, shard.left_out)


# The whole dataset


Make = Callable[..., Artifact]


@pytest.fixture
def sections_of(tmp_path: Path) -> Make:
    """Sections of reports, stored: `sections_of({"a.json": {...}, "b.md": "text"})`."""

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
    return make_dataset(sections, base, "tiny", Tokens(block_length=block), split, objectives)


@pytest.mark.parametrize("objectives", [Objectives(), BOTH, REWRITE])
def test_the_ledger_of_the_whole_balances_and_says_what_rewriting_left_out(
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


def test_an_edit_of_an_original_is_another_dataset_only_where_rewriting_is_taught(
    sections_of: Make, tiny_base: Path
) -> None:
    before, after = sections_of(FILES), sections_of(FILES | {"train.json": report(1, 2, original="older text")})
    assert before.about["version"] != after.about["version"]
    for objectives in (Objectives(), BOTH, REWRITE):
        versions = {made(sections, tiny_base, objectives).about["version"] for sections in (before, after)}
        assert len(versions) == (2 if objectives.rewrite else 1)


def test_what_objectives_weigh_is_no_part_of_the_dataset_and_which_are_taught_is(
    sections_of: Make, tiny_base: Path
) -> None:
    sections = sections_of(FILES)

    def key(**weights: float) -> str:
        return dataset_key(sections, tiny_base, "tiny", TOKENS, Pinned(), Objectives(**weights))

    assert key(text=1, rewrite=0.5) == key(text=0.1, rewrite=2)
    assert len({key(), key(rewrite=1), key(text=0, rewrite=1)}) == 3
    versions = {made(sections, tiny_base, objectives).about["version"] for objectives in (Objectives(), BOTH, REWRITE)}
    assert len(versions) == 3


def test_another_template_is_another_dataset_only_where_rewriting_is_taught(
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
    split = choose_split(sections, Tokens(held_out=0.01), Pinned(), REWRITE)
    assert split.held_out == {"y"}
    assert split.pinned.held_out == {"y"}


def test_of_pairs_of_a_single_chapter_sections_are_held_out(sections_of: Make, tiny_base: Path) -> None:
    sections = sections_of({"x.json": report(1, 2, 3, 4), "c.md": "Prose."})
    split = choose_split(sections, Tokens(held_out=0.01), Pinned(), REWRITE)
    (unit,) = split.held_out
    pairs = made(sections, tiny_base, REWRITE, split).about["pairs"]
    assert unit.startswith("x#S") and (pairs["train"], pairs["held_out"]) == (3, 1)


@pytest.mark.parametrize(("files", "count"), [({"c.md": "Prose."}, 0), ({"c.md": "Prose.", "x.json": report(1)}, 1)])
def test_rewriting_alone_without_pairs_is_refused_and_says_what_reports_must_have(
    sections_of: Make, files: dict[str, Any], count: int
) -> None:
    with pytest.raises(CorpusError) as caught:
        choose_split(sections_of(files), TOKENS, Pinned(), REWRITE)
    assert str(caught.value) == (
        f"objectives.rewrite is all that is taught, and the reports hold {count} pair(s); at least two are needed, one "
        "to train on and one to measure the adapter on. A pair is an `original` beside the `improved` text of a "
        "section, or `final_result.original_text` beside `final_text`, in a JSON file under outputs/consolidated/."
    )


def test_rewriting_alone_with_pairs_that_cannot_be_taught_is_refused_with_the_reasons(
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
    with pytest.raises(RecipeError, match=r"objectives\.rewrite is above 0, but the base model has no chat template"):
        made(sections, tmp_path, BOTH)


@pytest.mark.parametrize("objectives", [BOTH, REWRITE])
def test_the_example_report_has_pairs_with_briefs_and_all_of_them_are_taught(
    tiny_base: Path, tmp_path: Path, objectives: Objectives
) -> None:
    sections = make_sections(
        take_snapshot(PROJECT / "examples", tmp_path / "files.db", Store(tmp_path / "store")), Corpus()
    )
    pairs = [pair for chapter in all_chapters(sections) for pair in chapter.pairs]
    assert [(pair.title, len(pair.brief)) for pair in pairs if pair.brief] == [
        ("BACKGROUND KNOWLEDGE", 6),
        ("CURRENT RESEARCH", 7),
    ]
    options = Tokens(block_length=4096, held_out=0.1)
    split = choose_split(sections, options, Pinned(), objectives)
    dataset = make_dataset(sections, tiny_base, "tiny", options, split, objectives)
    found = dataset.about["pairs"]
    assert found["train"] + found["held_out"] == len(pairs) == 7 and found["left_out"] == {}
    documents = [document for document in all_documents(dataset) if document.objective == "rewrite"]
    assert {(d.chapter, d.title) for d in documents} == {
        ("chapter_3", "BACKGROUND KNOWLEDGE"),
        ("chapter_3", "CURRENT RESEARCH"),
        *(("chapter_11", t) for t in ("INTRODUCTION", "METHODOLOGY", "RESULTS", "DISCUSSION", "CONCLUSION")),
    }
