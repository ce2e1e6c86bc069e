"""The asset tokenized_dataset."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.corpus.snapshot import KIND as SNAPSHOT
from ft_dagster.dataset.dataset import all_documents, make_dataset, outline_sections
from ft_dagster.dataset.held_out.near_copies import BLOCKING_SHARE, WARNING_SHARE, how_known
from ft_dagster.dataset.held_out.record import read_pinned, write_pinned
from ft_dagster.dataset.sides import next_split
from ft_dagster.defs.assets.parallel_map import mapper_for
from ft_dagster.defs.assets.pictures import table
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.stages import (
    SECTIONS,
    TOKENIZED_DATASET,
    all_materializations,
    describe,
    input_artifact,
    last_artifact,
)
from ft_dagster.defs.workspace import Workspace
from ft_dagster.store.local import Artifact, Store

BALANCED = dg.AssetCheckSpec(
    "ledger_balances",
    asset=TOKENIZED_DATASET.key,
    blocking=True,
    description="Bytes of the report files = bytes trained on + held out + left out for a reason, exactly.",
)
SEPARATE = dg.AssetCheckSpec(
    "no_held_out_text_in_train",
    asset=TOKENIZED_DATASET.key,
    blocking=True,
    description=f"No section is on both sides, no row has tokens of the other side, and the train side "
    f"has at most {WARNING_SHARE:.0%} of the held-out text word for word (from {BLOCKING_SHARE:.0%} on it blocks).",
)

_MOST_NAMES = 100


@stage_asset(
    TOKENIZED_DATASET,
    kinds={"huggingface", "arrow"},
    check_specs=[BALANCED, SEPARATE],
)
def tokenized_dataset(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Sections as packed rows of tokens, train and held out, with a ledger that accounts for every byte."""
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    source = input_artifact(context, SECTIONS, store)
    base = prepare_base(recipe.base, settings.cache, token=settings.token, weights=False, say=_logged(context))
    last = last_artifact(all_materializations(context.instance), store, TOKENIZED_DATASET)
    artifact = _find_or_make(workspace, source, base, recipe, last)
    about = artifact.about
    ledger, pairs = about["ledger"], about["pairs"]
    if pairs["left_out"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in pairs["left_out"].items())
        taught = pairs["train"] + pairs["held_out"]
        context.log.warning(f"{taught} pair(s) are taught or held out; others are left out ({reasons})")
    return describe(
        TOKENIZED_DATASET,
        artifact,
        recipe,
        about["version"],
        {
            "train rows": about["splits"]["train"]["rows"],
            "train tokens": about["splits"]["train"]["tokens"],
            "held-out tokens": about["splits"]["held_out"]["tokens"],
            "held out": ", ".join(about["held_out"][:_MOST_NAMES]),
            "held-out share of the text": ledger["held_out"] / max(1, ledger["train"] + ledger["held_out"]),
            "row fill": about["splits"]["train"]["fill"],
            "share of usable text": (ledger["train"] + ledger["held_out"]) / about["usable"],
            "objectives": ", ".join(about["objectives"]),
            **_pairs(about),
            "ledger": table([{"where": name, "bytes": size} for name, size in ledger_rows(ledger)]),
            "chapters": table(_chapter_rows(artifact), source.about["chapters"]),
        },
        [_balanced(about, store), _separate(about)],
    )


def _logged(context: dg.AssetExecutionContext) -> Callable[[str], None]:
    return lambda step: context.log.info(f"Base model: {step}")


def ledger_rows(ledger: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the rows of the ledger: the bytes in, then where they went."""
    by_size = sorted(ledger["left_out"].items(), key=lambda item: -item[1])
    left_out = [(f"left out: {reason}", size) for reason, size in by_size]
    return [("in", ledger["bytes_in"]), ("train", ledger["train"]), ("held out", ledger["held_out"]), *left_out]


def _find_or_make(
    workspace: Workspace, source: Artifact, base: PreparedBase, recipe: Recipe, last: Artifact | None
) -> Artifact:
    """Return the dataset of these sections. The side of every chapter is recorded before it is made."""
    settings, objectives = workspace.settings, recipe.objectives
    each = mapper_for(settings)
    outline = outline_sections(source, each)
    learned = partial(workspace.releases.learned, source.store)
    split = next_split(outline, recipe.tokens, read_pinned(settings.pins), objectives, last, learned)
    write_pinned(settings.pins, split.pinned)
    return make_dataset(outline, Path(base.folder), base.tokenizer, recipe.tokens, split, objectives, each)


def _pairs(about: Any) -> dict[str, Any]:
    """Return what happened to the pairs, where the recipe teaches them."""
    pairs = about["pairs"]
    if "rewrite" not in about["objectives"]:
        return {}
    return {
        "train pairs": pairs["train"],
        "held-out pairs": pairs["held_out"],
        "pairs left out": sum(pairs["left_out"].values()),
        "pairs left out by reason": table([{"reason": name, "pairs": n} for name, n in pairs["left_out"].items()]),
        "pairs left out by name": table(pairs["listed"], sum(pairs["left_out"].values())),
    }


def _chapter_rows(dataset: Artifact) -> Iterator[dict[str, Any]]:
    for chapter, documents in groupby(all_documents(dataset), lambda document: document.chapter):
        counts: dict[str, Counter[str]] = {}
        for document in documents:
            side = counts.setdefault(document.split, Counter(sections=0, pairs=0))
            side["sections" if document.objective == "text" else "pairs"] += 1
            side["tokens"] += document.tokens
        for name, side in counts.items():
            yield {"chapter": chapter, "side": name.replace("_", " "), **side}


def _balanced(about: Any, store: Store) -> dg.AssetCheckResult:
    """Compare the ledger with the sizes of the files in the snapshot that the dataset was made from."""
    bytes_in = store.get(SNAPSHOT, about["made_from"][SNAPSHOT]).about["bytes"]
    ledger = about["ledger"]
    accounted = ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values())
    return dg.AssetCheckResult(
        check_name=BALANCED.name,
        asset_key=TOKENIZED_DATASET.key,
        passed=bytes_in == accounted == ledger["bytes_in"],
        metadata={"bytes in the files": bytes_in, "bytes accounted for": accounted},
    )


def _separate(about: Any) -> dg.AssetCheckResult:
    known = about["known"]
    faults = any(about["checks"].values())
    return dg.AssetCheckResult(
        check_name=SEPARATE.name,
        asset_key=TOKENIZED_DATASET.key,
        passed=not faults and known <= WARNING_SHARE,
        severity=dg.AssetCheckSeverity.ERROR if faults or known >= BLOCKING_SHARE else dg.AssetCheckSeverity.WARN,
        description=None if known <= WARNING_SHARE else how_known(known),
        metadata={**about["checks"], "held-out text known from train": known},
    )
