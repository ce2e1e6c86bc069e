"""The split of the next dataset of a workspace, from what the last one and the adapter in use were made of."""

import json
from collections.abc import Callable, Collection
from functools import partial

from ft_dagster.config.recipe import Objectives, Tokens
from ft_dagster.dataset.dataset import all_documents, dataset_shards
from ft_dagster.dataset.held_out.choice import FINGERPRINT, Before, choose_split
from ft_dagster.dataset.held_out.outline import Outline, OutlineGroup
from ft_dagster.dataset.held_out.record import Pinned, Split, section_unit
from ft_dagster.dataset.shard import SPLITS
from ft_dagster.dataset.stats import fingerprints
from ft_dagster.store.local import Artifact


def sides_of(dataset: Artifact) -> dict[str, set[str]]:
    """Return split -> the fingerprints of the sections and pairs on that side of a dataset."""
    shards = dataset_shards(dataset)
    dataset.store.fetch_blobs(shard.figures for shard in shards)
    sides: dict[str, set[str]] = {name: set() for name in SPLITS}
    for shard in shards:
        for name, found in fingerprints(json.loads(dataset.store.get_blob(shard.figures))).items():
            sides[name] |= found
    return sides


def next_split(
    outline: Outline,
    options: Tokens,
    pinned: Pinned,
    objectives: Objectives,
    last: Artifact | None,
    learned: Callable[[], Collection[str]],
) -> Split:
    """Return the split of the next dataset of a workspace.

    Args:
        outline: the outline of the sections.
        options: the recipe's options for tokens.
        pinned: the recorded sides.
        objectives: the recipe's objectives.
        last: the last dataset of the workspace, if there is one.
        learned: returns the hashes of the sections that the adapter in use was trained on.

    Raises:
        CorpusError: nothing can be held out.
    """
    before = Before(learned)
    if last is not None and pinned.share is not None:
        outlined = {shard.outline_key: shard.outline for shard in dataset_shards(last) if shard.outline}

        def read_group(key: str) -> OutlineGroup:
            return OutlineGroup.read(key, last.store.get_blob(outlined[key]))

        before = Before(learned, partial(sides_of, last), outlined, read_group)
    elif last is not None:
        pinned = recorded_sides(last, pinned, options.held_out, outline)
        sides, known = sides_of(last), {section[:FINGERPRINT] for section in learned()}
        sides["held_out"] -= known  # a chapter may have had another name by then
        before = Before(learned, lambda: sides)
    return choose_split(outline, options, pinned, objectives, before)


def recorded_sides(dataset: Artifact, pinned: Pinned, share: float, outline: Outline) -> Pinned:
    """Return the sides of the chapters of a dataset that an earlier version made, which recorded only some of them.

    Args:
        dataset: the last dataset of the workspace.
        pinned: what was recorded.
        share: the recipe's `tokens.held_out`.
        outline: the outline of the present sections, which says what sections a pair has.
    """
    chapters: dict[str, dict[str, str]] = {}
    pairs: dict[tuple[str, str], str] = {}
    for document in all_documents(dataset):
        if document.objective == "text":
            chapters.setdefault(document.chapter, {})[document.title] = document.split
        else:
            pairs[document.chapter, document.section] = document.split
    if pairs and not chapters:  # only pairs are taught
        for row in (row for group in outline.groups() for row in group.rows):
            if side := pairs.get((row.chapter, row.pair)):
                chapters.setdefault(row.chapter, {})[row.title] = side
    held_out, train = set(pinned.held_out), set(pinned.train)
    for chapter, titles in chapters.items():
        divided = len(set(titles.values())) > 1
        if divided:
            train.discard(chapter)  # sections that come later are chosen like those of a new chapter
        for title, side in titles.items():
            (held_out if side == "held_out" else train).add(section_unit(chapter, title) if divided else chapter)
    return Pinned(frozenset(held_out), frozenset(train), share)
