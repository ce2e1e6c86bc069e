"""Pairs as exchanges: each is taught completely or left out for a reason, and every byte is accounted for."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.chapter import Chapter, Section
from ft_dagster.corpus.pairs import Pair
from ft_dagster.dataset.chat import CONTROL, ChatTokenizer, EncodedExchange
from ft_dagster.dataset.held_out.record import Pinned, Split
from ft_dagster.dataset.rewriting import INSTRUCTION, TOO_LONG, Refusal, request_text
from ft_dagster.dataset.shard import (
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
from ft_dagster.dataset.table import OBJECTIVES
from ft_dagster.dataset.tokenizer import DocumentTokenizer
from ft_dagster.store.hashing import digest

BLOCK = 160
SPLITS = ("train", "held_out")
HELD_OUT = Split(frozenset({"held", "other#B"}), Pinned())

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


@pytest.fixture(scope="session")
def chat(tiny_base: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_base)


def section(chapter: str, title: str, text: str) -> Section:
    return Section(chapter, title, 2, (), text, f"{chapter}.json", digest([title, text]))


def chapter(name: str, *parts: tuple[str, str], pairs: Sequence[tuple[int, ...]] = (), **options: Any) -> Chapter:
    """Return a chapter of (title, text) with pairs for some of its sections; `options` are those of each pair."""
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
    """Return for the hash of each pair what its piece contains, and what of it is supervised."""
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


def test_pairs_add_no_bytes_if_sections_are_taught_too(tokenizer: DocumentTokenizer, chat: ChatTokenizer) -> None:
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
def test_a_pair_that_cannot_be_taught_is_named_and_left_out_with_its_bytes(
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
    """Return chapters of parts: text, how many sections it makes, its original, and whether it is whole."""
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
def test_every_byte_is_accounted_for_and_every_answer_is_supervised_once(
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
