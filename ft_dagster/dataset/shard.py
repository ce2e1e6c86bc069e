"""Chapters of a group -> packed rows of tokens, train and held out, without losing one."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ft_dagster.corpus.chapter import Chapter
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.pairs import Pair
from ft_dagster.dataset.chat import NOT_IN_VOCABULARY, ChatTokenizer
from ft_dagster.dataset.held_out import Split
from ft_dagster.dataset.rewriting import Refusal, tokenize_pairs
from ft_dagster.dataset.table import PlacedPiece, count_rows, flat, pack_pieces
from ft_dagster.dataset.tokenized import TokenizedText, tokenize_sections
from ft_dagster.dataset.tokenizer import DocumentTokenizer

SPLITS = ("train", "held_out")
NO_PAIR = "no original to rewrite it from"
NOT_WHOLE = "part of its pair is an exact duplicate"
BOTH_SIDES = "pair on both sides of the split"
OF_THE_SPLIT = (NOT_WHOLE, BOTH_SIDES)
"""Reasons that are not the pair's own, so that they may pass."""


@dataclass(frozen=True)
class Teaching:
    """What is taught, and by which tokenizers."""

    tokenizer: DocumentTokenizer
    block_length: int
    """Tokens in a row, at most."""
    text: bool = True
    """Whether sections are taught as prose."""
    chat: ChatTokenizer | None = None
    """Where pairs are taught: what renders them."""


@dataclass(frozen=True)
class Known:
    """What is known from earlier, by hash, of the same tokenizer, template and block length."""

    texts: Mapping[str, TokenizedText] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One section, or one pair, as it went into the dataset."""

    chapter: str
    title: str
    section: str
    """The section's content hash, or the pair's."""
    source: str
    split: str
    tokens: int
    bytes: int
    scored_bytes: int
    lost_bytes: int
    """These four as in TokenizedText."""
    objective: str = "text"
    """Of a pair `rewrite`."""
    prompt: int = 1
    """As in TokenizedText."""


@dataclass(frozen=True)
class RefusedPair:
    """A pair that is not taught."""

    chapter: str
    title: str
    pair: str
    """Its hash."""
    reason: str
    tokens: int
    """How many it has, where it is too long for a block."""


@dataclass
class PackedShard:
    """The rows of a group of chapters."""

    documents: list[Document] = field(default_factory=list)
    """In reading order within a chapter, pairs after sections; rows hold indices into this list."""
    refused: list[RefusedPair] = field(default_factory=list)
    rows: dict[str, pa.Table] = field(default_factory=dict)
    """Split -> rows, as in `pack_pieces`. A split without text has none."""
    used: Counter[str] = field(default_factory=Counter)
    """Split -> bytes of the reports."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> bytes of sections that are not taught."""


def pack_chapters(
    chapters: Sequence[Chapter], teaching: Teaching, split: Split, known: Known | None = None
) -> PackedShard:
    """Tokenize what is not known yet, and pack all into rows.

    What the rows are does not depend on names or on the order of sections. Bytes of a section are used once, however
    many objectives teach it: where sections are not taught as prose, those that a taught pair holds are used.

    Args:
        chapters: one group of them.
        teaching: what is taught.
        split: which chapters are held out.
        known: from earlier.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
        RecipeError: the base's chat template cannot be used.
        LedgerError: tokens do not add up.
    """
    known = known or Known()
    packer = _Packer(teaching, split)
    texts = dict(known.texts)
    if teaching.text:
        fresh = [section for chapter in chapters for section in chapter.sections if section.hash not in texts]
        texts |= tokenize_sections(fresh, teaching.tokenizer, teaching.block_length)
    pairs: dict[str, TokenizedText | Refusal] = {}
    if teaching.chat:
        pairs |= {**known.refused, **known.texts}
        usable = {pair.hash: pair for chapter in chapters for pair in chapter.pairs if packer.side(chapter, pair)}
        new = [pair for name, pair in usable.items() if name not in pairs]
        pairs |= tokenize_pairs(new, teaching.chat, teaching.block_length)
    for chapter in chapters:
        if teaching.text:
            packer.teach_text(chapter, texts)
        if teaching.chat:
            packer.teach_pairs(chapter, pairs)
    return packer.finish()


class _Packer:
    """Puts the pieces of documents together, and keeps account of bytes."""

    def __init__(self, teaching: Teaching, split: Split) -> None:
        self.teaching = teaching
        self.split = split
        self.shard = PackedShard()
        self.pieces: dict[str, list[PlacedPiece]] = defaultdict(list)

    def teach_text(self, chapter: Chapter, texts: Mapping[str, TokenizedText]) -> None:
        for section in chapter.sections:
            text = texts[section.hash]
            side = self._side_of(section.chapter, section.title)
            self._teach(side, text, section.chapter, section.title, section.hash, section.source)
            self.shard.used[side] += section.used_bytes - text.lost_bytes
            self.shard.left_out[NOT_IN_VOCABULARY] += text.lost_bytes

    def teach_pairs(self, chapter: Chapter, pairs: Mapping[str, TokenizedText | Refusal]) -> None:
        """Teach the pairs of a chapter; where that is all that is taught of it, account for its sections."""
        reasons = dict.fromkeys(range(len(chapter.sections)), NO_PAIR)
        for pair in chapter.pairs:
            side = self.side(chapter, pair)
            found = pairs[pair.hash] if side else Refusal(BOTH_SIDES if pair.whole else NOT_WHOLE)
            if isinstance(found, Refusal):
                self.shard.refused.append(RefusedPair(chapter.name, pair.title, pair.hash, found.reason, found.tokens))
                reasons |= dict.fromkeys(pair.sections, found.reason)
                continue
            self._teach(side, found, chapter.name, pair.title, pair.hash, pair.source, "rewrite")
            if not self.teaching.text:
                self.shard.used[side] += sum(chapter.sections[place].used_bytes for place in pair.sections)
                reasons = {place: reason for place, reason in reasons.items() if place not in pair.sections}
        if not self.teaching.text:
            for place, reason in reasons.items():
                self.shard.left_out[reason] += chapter.sections[place].used_bytes

    def side(self, chapter: Chapter, pair: Pair) -> str:
        """Where all of a pair stands; nowhere if it is not whole, or stands on both sides."""
        sides = {self._side_of(chapter.name, chapter.sections[place].title) for place in pair.sections}
        return sides.pop() if pair.whole and len(sides) == 1 else ""

    def finish(self) -> PackedShard:
        shard = self.shard
        shard.used, shard.left_out = +shard.used, +shard.left_out
        for side in SPLITS:
            if self.pieces[side]:
                shard.rows[side] = pack_pieces(self.pieces[side], self.teaching.block_length)
        _check_tokens(shard, len(self.teaching.tokenizer.prefix))
        return shard

    def _side_of(self, chapter: str, section: str) -> str:
        return "held_out" if self.split.holds_out(chapter, section) else "train"

    def _teach(
        self, side: str, text: TokenizedText, chapter: str, title: str, name: str, source: str, objective: str = "text"
    ) -> None:
        index = len(self.shard.documents)
        self.pieces[side] += [
            PlacedPiece((name, place), index, ids, text.prompt, objective) for place, ids in enumerate(text.pieces)
        ]
        self.shard.documents.append(
            Document(
                chapter,
                title,
                name,
                source,
                side,
                text.tokens,
                text.bytes,
                text.scored_bytes,
                text.lost_bytes,
                objective,
                text.prompt,
            )
        )


def tokenized_texts(documents: Sequence[Document], rows: Mapping[str, pa.Table]) -> dict[str, TokenizedText]:
    """Hash of a section or pair -> tokens, taken back out of packed rows."""
    pieces: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for table in rows.values():
        ids, lengths, owners, places = (flat(table, name) for name in ("input_ids", "lengths", "documents", "pieces"))
        ends = np.cumsum(lengths)
        for end, length, owner, place in zip(ends, lengths, owners, places, strict=True):
            pieces[int(owner)][int(place)] = ids[end - length : end]
    return {
        document.section: TokenizedText(
            tuple(pieces[index][place] for place in range(len(pieces[index]))),
            document.tokens,
            document.bytes,
            document.scored_bytes,
            document.lost_bytes,
            document.prompt,
        )
        for index, document in enumerate(documents)
    }


def _check_tokens(shard: PackedShard, prefix: int) -> None:
    """Every token of every document is in a row once, and supervised once if it is not the first, or a prompt's."""
    for side in SPLITS:
        expected: Counter[str] = Counter()
        for document in shard.documents:
            if document.split == side:
                before = prefix if document.objective == "text" else document.prompt
                expected["tokens"] += before + document.tokens + 1
                expected["supervised_tokens"] += before + document.tokens + 1 - document.prompt
        found = count_rows(shard.rows.get(side))
        for name in ("tokens", "supervised_tokens"):
            if found[name] != expected[name]:
                words = name.replace("_", " ")
                raise LedgerError(f"{side}: {expected[name]} {words} in documents, {found[name]} in rows")
