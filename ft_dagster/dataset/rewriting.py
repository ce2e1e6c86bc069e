"""Pairs as exchanges: a model that is asked to rewrite the original text answers with the improved text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ft_dagster.corpus.markdown import byte_length
from ft_dagster.corpus.pairs import Pair
from ft_dagster.dataset.chat import ChatTokenizer
from ft_dagster.dataset.tokenized import TokenizedText

INSTRUCTION = "Rewrite this section of a report so that it is ready to be published. Write in Markdown."
BRIEF = "Improve these points:"
TOO_LONG = "pair longer than a block"
_BATCH = 128


@dataclass(frozen=True)
class Refusal:
    """The reason why a pair is not taught."""

    reason: str
    tokens: int = 0
    """Number of tokens, if the pair is too long."""


def request_text(pair: Pair) -> str:
    """Return the request that a model receives for a pair.

    >>> print(request_text(Pair("Costs", "## Costs\\n\\nThey fell.", "", ("Say why",), "a.json", ())))
    Rewrite this section of a report so that it is ready to be published. Write in Markdown.
    <BLANKLINE>
    Improve these points:
    - Say why
    <BLANKLINE>
    ## Costs
    <BLANKLINE>
    They fell.
    """
    brief = [f"{BRIEF}\n" + "\n".join(f"- {point}" for point in pair.brief)] if pair.brief else []
    return "\n\n".join([INSTRUCTION, *brief, pair.original])


def tokenize_pairs(
    pairs: Iterable[Pair], chat: ChatTokenizer, block_length: int
) -> Iterator[tuple[str, TokenizedText | Refusal]]:
    """Yield the hash of each pair, and its tokens or the reason why it is not taught.

    The tokens are a single piece, because a pair is never cut.
    """
    remaining = iter(pairs)
    while batch := list(islice(remaining, _BATCH)):
        encoded = chat.encode([(request_text(pair), pair.improved) for pair in batch])
        for pair, found in zip(batch, encoded, strict=True):
            if isinstance(found, str):
                yield pair.hash, Refusal(found)
            elif (length := len(found.prompt) + len(found.answer)) > block_length:
                yield pair.hash, Refusal(TOO_LONG, length)
            else:
                size = byte_length(found.text)
                ids = np.asarray([*found.prompt, *found.answer], dtype=np.int32)
                yield pair.hash, TokenizedText((ids,), len(found.answer) - 1, size, size, 0, len(found.prompt))
