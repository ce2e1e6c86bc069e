"""The asset tokenized_dataset."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base import PreparedBase, prepare_base
from ft_dagster.defs.pictures import table
from ft_dagster.defs.raw_chapters import read_snapshot
from ft_dagster.defs.sections import REPORT, stored_sections
from ft_dagster.defs.stages import (
    RAW_CHAPTERS,
    SECTIONS,
    TOKENIZED_DATASET,
    describe,
    input_artifact,
)
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
from ft_dagster.recipe import Recipe
from ft_dagster.settings import Settings
from ft_dagster.store import Artifact, Store, digest
from ft_dagster.tokens.dataset import SPLITS, Document, prepare_dataset, read_documents, row_documents
from ft_dagster.tokens.held_out import Pinned, choose_held_out, read_pinned, write_pinned
from ft_dagster.tokens.tokenizer import DocumentTokenizer

BALANCED = dg.AssetCheckSpec(
    "ledger_balances",
    asset=TOKENIZED_DATASET.key,
    blocking=True,
    description="Bytes of the report files = bytes trained on + held out + left out for a reason, to the byte.",
)
SEPARATE = dg.AssetCheckSpec(
    "no_held_out_text_in_train",
    asset=TOKENIZED_DATASET.key,
    blocking=True,
    description="No section stands on both sides, and no row of one side holds tokens of the other.",
)


@dg.asset(
    deps=TOKENIZED_DATASET.parents,
    code_version=TOKENIZED_DATASET.code_version,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"huggingface", "arrow"},
    check_specs=[BALANCED, SEPARATE],
)
def tokenized_dataset(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Sections as packed rows of tokens, train and held out, with the ledger of every byte."""
    settings, store, recipe = workspace.settings, workspace.store, workspace.recipe
    source = input_artifact(context, SECTIONS, store)
    base = prepare_base(recipe.base, settings.cache, token=settings.token, weights=False)
    artifact = _find_or_write(store, settings, source, base, recipe)
    about, documents = artifact.about, read_documents(artifact.path)
    ledger = about["ledger"]
    usable = ledger["train"] + ledger["held_out"]
    lost = ledger["left_out"].get("not in the tokenizer's vocabulary", 0)
    return describe(
        TOKENIZED_DATASET,
        artifact,
        recipe,
        about["version"],
        {
            "train rows": about["splits"]["train"]["rows"],
            "train tokens": about["splits"]["train"]["tokens"],
            "held-out tokens": about["splits"]["held_out"]["tokens"],
            "row fill": about["splits"]["train"]["fill"],
            "share of usable text": usable / (usable + lost),
            "ledger": table([{"where": name, "bytes": size} for name, size in ledger_rows(ledger)]),
            "chapters": table(_chapter_rows(documents)),
        },
        [_balanced(about, store), _separate(artifact, documents)],
    )


def ledger_rows(ledger: dict[str, Any]) -> list[tuple[str, int]]:
    """The ledger, line by line: bytes in, then where they went."""
    by_size = sorted(ledger["left_out"].items(), key=lambda item: -item[1])
    left_out = [(f"left out: {reason}", size) for reason, size in by_size]
    return [("in", ledger["bytes_in"]), ("train", ledger["train"]), ("held out", ledger["held_out"]), *left_out]


def _find_or_write(store: Store, settings: Settings, source: Artifact, base: PreparedBase, recipe: Recipe) -> Artifact:
    """The dataset of these sections. Sections of equal content are the same sections: their version is in the key."""
    pins = settings.state / "held_out.json"
    pinned = read_pinned(pins)
    key = _key(source, base, recipe, pinned)
    if found := store.find(TOKENIZED_DATASET.name, key):
        return found
    split = choose_held_out(
        ((section.chapter, section.title, section.used_bytes) for section in stored_sections(source)),
        recipe.tokens.held_out,
        pinned,
    )
    write_pinned(pins, split.pinned)
    key = _key(source, base, recipe, split.pinned)
    with store.staging() as folder:
        about = prepare_dataset(
            stored_sections(source),
            DocumentTokenizer(Path(base.folder)),
            recipe.tokens,
            split,
            _read_report(source),
            folder,
        )
        origin = {RAW_CHAPTERS.name: source.about[RAW_CHAPTERS.name], SECTIONS.name: source.key}
        return store.take_in(TOKENIZED_DATASET.name, key, folder, about | {"made_from": origin})


def _key(source: Artifact, base: PreparedBase, recipe: Recipe, pinned: Pinned) -> str:
    pins = [sorted(pinned.held_out), sorted(pinned.train)]
    code = TOKENIZED_DATASET.code_version
    return digest([source.about["version"], base.tokenizer, recipe.part("tokens"), pins, code])


def _read_report(source: Artifact) -> dict[str, Any]:
    return json.loads((source.path / REPORT).read_bytes())


def _chapter_rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    tokens: Counter[tuple[str, str]] = Counter()
    sections: Counter[tuple[str, str]] = Counter()
    for document in documents:
        tokens[document.chapter, document.split] += document.tokens
        sections[document.chapter, document.split] += 1
    return [
        {"chapter": chapter, "side": split.replace("_", " "), "sections": sections[chapter, split], "tokens": count}
        for (chapter, split), count in tokens.items()
    ]


def _balanced(about: Any, store: Store) -> dg.AssetCheckResult:
    """Compare the ledger with the sizes of the files in the snapshot that the dataset was made from."""
    files, unreadable = read_snapshot(store.get(RAW_CHAPTERS.name, about["made_from"][RAW_CHAPTERS.name]))
    bytes_in = sum(file.size for file in files) + sum(item.size for item in unreadable)
    ledger = about["ledger"]
    accounted = ledger["train"] + ledger["held_out"] + sum(ledger["left_out"].values())
    return dg.AssetCheckResult(
        check_name=BALANCED.name,
        asset_key=TOKENIZED_DATASET.key,
        passed=bytes_in == accounted == ledger["bytes_in"],
        metadata={"bytes in the files": bytes_in, "bytes accounted for": accounted},
    )


def _separate(artifact: Artifact, documents: Sequence[Document]) -> dg.AssetCheckResult:
    texts = {split: {d.section for d in documents if d.split == split} for split in SPLITS}
    shared = texts["train"] & texts["held_out"]
    strayed = [
        index for split in SPLITS for index in row_documents(artifact.path, split) if documents[index].split != split
    ]
    return dg.AssetCheckResult(
        check_name=SEPARATE.name,
        asset_key=TOKENIZED_DATASET.key,
        passed=not shared and not strayed,
        metadata={"sections on both sides": len(shared), "rows with documents of the other side": len(strayed)},
    )
