"""The asset sections."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dagster as dg

from ft_dagster.corpus.sections import Section, SectionsReport, as_rows, content_version, read_sections
from ft_dagster.defs.pictures import table
from ft_dagster.defs.raw_chapters import read_snapshot
from ft_dagster.defs.stages import RAW_CHAPTERS, SECTIONS, describe, input_artifact
from ft_dagster.defs.workspace import GROUP, OWNERS, Workspace
from ft_dagster.recipe import Recipe
from ft_dagster.store import Artifact, Store, digest

LINES = "sections.jsonl"
REPORT = "report.json"
READABLE = dg.AssetCheckSpec(
    "every_file_is_readable",
    asset=SECTIONS.key,
    blocking=True,
    description="No report file is left out because it cannot be read (recipe: `corpus.unreadable`).",
)


@dg.asset(
    deps=[RAW_CHAPTERS.key],
    code_version=SECTIONS.code_version,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"json"},
    check_specs=[READABLE],
)
def sections(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Sections of the reports as JSON Lines: cleaned, one version of each, each text once, every byte accounted for."""
    store, recipe = workspace.store, workspace.recipe
    raw = input_artifact(context, RAW_CHAPTERS, store)
    key = digest([raw.key, SECTIONS.code_version, recipe.part("corpus")])
    artifact = store.find(SECTIONS.name, key) or _write(store, key, raw, recipe)
    report = json.loads((artifact.path / REPORT).read_bytes())
    left_out = left_out_by_reason(report)
    return describe(
        SECTIONS,
        artifact,
        recipe,
        artifact.about["version"],
        {
            "chapters": report["chapters"],
            "sections": report["sections"],
            "words": report["words"],
            "bytes used": sum(file["used"] for file in report["files"]),
            "bytes left out": sum(left_out.values()),
            "left out by reason": table([{"reason": name, "bytes": size} for name, size in left_out.most_common()]),
            "sections removed": table([{"reason": name, "sections": n} for name, n in report["removed"].items()]),
            "files": table([_row(file) for file in report["files"]]),
        },
        [_readable(report, recipe)],
    )


def _write(store: Store, key: str, raw: Artifact, recipe: Recipe) -> Artifact:
    files, unreadable = read_snapshot(raw)
    report = SectionsReport()
    found = read_sections(files, unreadable, lambda file: store.get_blob(file.sha256), recipe.corpus, report)
    with store.staging() as folder:
        with (folder / LINES).open("w", encoding="utf-8") as lines:

            def written() -> Iterator[Section]:
                for section in found:
                    lines.write(section.to_json() + "\n")
                    yield section

            version = content_version(written())
        (folder / REPORT).write_text(json.dumps(as_rows(report), indent=1, ensure_ascii=False), "utf-8")
        return store.take_in(SECTIONS.name, key, folder, {"version": version, RAW_CHAPTERS.name: raw.key})


def stored_sections(artifact: Artifact) -> Iterator[Section]:
    """The sections of an artifact, one at a time."""
    with (artifact.path / LINES).open(encoding="utf-8") as lines:
        for line in lines:
            yield Section.from_json(line)


def left_out_by_reason(report: dict[str, Any]) -> Counter[str]:
    """Bytes left out of all files, by reason."""
    left_out: Counter[str] = Counter()
    for file in report["files"]:
        left_out.update(file["left_out"])
    return left_out


def _row(file: dict[str, Any]) -> dict[str, Any]:
    left_out = ", ".join(f"{name} {size}" for name, size in file["left_out"].items())
    return {
        "file": file["path"],
        "bytes": file["size"],
        "used": file["used"],
        "left out": left_out,
        "problem": file.get("problem", ""),
    }


def _readable(report: dict[str, Any], recipe: Recipe) -> dg.AssetCheckResult:
    unreadable = report["unreadable"]
    skip = recipe.corpus.unreadable == "skip"
    listed = "\n".join(f"{item['path']}: {item['reason']}" for item in unreadable)
    advice = (
        "Left out, as the recipe says."
        if skip
        else "Mend or remove them, or set `corpus: {unreadable: skip}` in the recipe."
    )
    return dg.AssetCheckResult(
        check_name=READABLE.name,
        asset_key=SECTIONS.key,
        passed=skip or not unreadable,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{len(unreadable)} file(s) cannot be read. {advice}\n{listed}" if unreadable else None,
        metadata={"unreadable": table(unreadable)},
    )
