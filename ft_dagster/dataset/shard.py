"""Packing the chapters of a group into rows of tokens, train and held out, without losing a token."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ft_dagster.corpus.chapter import Chapter
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.pairs import Pair
from ft_dagster.dataset.chat import NOT_IN_VOCABULARY, ChatTokenizer
from ft_dagster.dataset.held_out.record import Split
from ft_dagster.dataset.rewriting import Refusal, tokenize_pairs
from ft_dagster.dataset.table import PlacedPiece, count_rows, flat, pack_pieces
from ft_dagster.dataset.tokenized import TokenizedText, tokenize_sections
from ft_dagster.dataset.tokenizer import DocumentTokenizer

SPLITS = ("train", "held_out")
NO_PAIR = "no original to rewrite it from"
NOT_WHOLE = "part of its pair is an exact duplicate"
BOTH_SIDES = "pair on both sides of the split"
OF_THE_SPLIT = (NOT_WHOLE, BOTH_SIDES)
"""Reasons that do not lie in the pair itself, so they may no longer apply in the next dataset."""


@dataclass(frozen=True)
class Teaching:
    """What is taught, and with which tokenizers."""

    tokenizer: DocumentTokenizer
    block_length: int
    """Maximum number of tokens in a row."""
    text: bool = True
    """Whether sections are taught as prose."""
    chat: ChatTokenizer | None = None
    """Renders and encodes pairs; None if no pairs are taught."""


@dataclass(frozen=True)
class Known:
    """Results from an earlier dataset with the same tokenizer, template and block length, by hash."""

    texts: Mapping[str, TokenizedText] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One section, or one pair, as it is in the dataset."""

    chapter: str
    title: str
    section: str
    """Content hash of the section or of the pair."""
    source: str
    split: str
    tokens: int
    bytes: int
    scored_bytes: int
    lost_bytes: int
    """These four fields are as in TokenizedText."""
    objective: str = "text"
    """The objective that teaches it; `rewrite` for a pair."""
    prompt: int = 1
    """As in TokenizedText: number of tokens that are read and not supervised."""


@dataclass(frozen=True)
class RefusedPair:
    """A pair that is not taught."""

    chapter: str
    title: str
    pair: str
    """Hash of the pair."""
    reason: str
    tokens: int
    """Number of tokens, if the pair is too long for a block."""


@dataclass
class PackedShard:
    """The packed rows of a group of chapters."""

    documents: list[Document] = field(default_factory=list)
    """Documents in reading order within a chapter, pairs after sections. Rows contain indices into this list."""
    refused: list[RefusedPair] = field(default_factory=list)
    rows: dict[str, pa.Table] = field(default_factory=dict)
    """Split -> rows, as in `pack_pieces`. A split without text is missing."""
    used: Counter[str] = field(default_factory=Counter)
    """Split -> number of bytes of the reports."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of bytes of sections that are not taught."""


def pack_chapters(
    chapters: Sequence[Chapter], teaching: Teaching, split: Split, known: Known | None = None
) -> PackedShard:
    """Tokenize the texts that are not known yet, and pack all texts into rows.

    The rows do not depend on names or on the order of sections. The bytes of a section count as used once, however many
    objectives teach it. If sections are not taught as prose, the sections that a taught pair covers count as used.

    Args:
        chapters: the chapters of one group.
        teaching: what is taught.
        split: which chapters are held out.
        known: the results from an earlier dataset.

    Raises:
        CorpusError: a text cannot be tokenized without loss.
        RecipeError: the base model's chat template cannot be used.
        LedgerError: the tokens do not add up.
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
    """Collects the pieces of documents, and accounts for their bytes."""

    def __init__(self, teaching: Teaching, split: Split) -> None:
        self.teaching = teaching
        self.split = split
        self.shard = PackedShard()
        self.pieces: dict[str, list[PlacedPiece]] = defaultdict(list)

    def teach_text(self, chapter: Chapter, texts: Mapping[str, TokenizedText]) -> None:
        """Teach the sections of a chapter as prose."""
        for section in chapter.sections:
            text = texts[section.hash]
            side = self._side_of(section.chapter, section.title)
            self._teach(side, text, section.chapter, section.title, section.hash, section.source)
            self.shard.used[side] += section.used_bytes - text.lost_bytes
            self.shard.left_out[NOT_IN_VOCABULARY] += text.lost_bytes

    def teach_pairs(self, chapter: Chapter, pairs: Mapping[str, TokenizedText | Refusal]) -> None:
        """Teach the pairs of a chapter. If only pairs are taught, also account for the bytes of its sections."""
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
        """Return the split that a pair belongs to, or an empty string if it is not whole or is on both sides."""
        sides = {self._side_of(chapter.name, chapter.sections[place].title) for place in pair.sections}
        return sides.pop() if pair.whole and len(sides) == 1 else ""

    def finish(self) -> PackedShard:
        """Pack the pieces into rows, check them, and return the shard."""
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
    """Return the tokens of each section and pair, by hash, recovered from packed rows."""
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
    """Check that every token is in a row once, and is supervised once unless it is the first one or in a prompt.

    Raises:
        LedgerError: the counts differ.
    """
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
