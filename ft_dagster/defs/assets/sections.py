"""The asset sections."""

from collections import Counter
from typing import Any

import dagster as dg

from ft_dagster.config.recipe import Recipe
from ft_dagster.corpus.ledger import FileLedger
from ft_dagster.corpus.secrets import SecretFinding
from ft_dagster.corpus.sections import all_chapters, make_sections, secret_findings, unreadable_rows
from ft_dagster.defs.assets.parallel_map import mapper_for
from ft_dagster.defs.assets.pictures import table
from ft_dagster.defs.assets.stage_asset import stage_asset
from ft_dagster.defs.stages import RAW_CHAPTERS, SECTIONS, describe, input_artifact
from ft_dagster.defs.workspace import Workspace

READABLE = dg.AssetCheckSpec(
    "every_file_is_readable",
    asset=SECTIONS.key,
    blocking=True,
    description="No report file is left out because it cannot be read (recipe: `corpus.unreadable`).",
)

SECRETS = dg.AssetCheckSpec(
    "no_keys_or_personal_data",
    asset=SECTIONS.key,
    blocking=True,
    description="No text looks like a key or like personal data. A warning, unless `corpus.secrets` is `block`.",
)


@stage_asset(
    SECTIONS,
    kinds={"json"},
    check_specs=[READABLE, SECRETS],
)
def sections(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Sections of the reports as JSON Lines: cleaned, merged and deduplicated, with every byte accounted for."""
    snapshot = input_artifact(context, RAW_CHAPTERS, workspace.store)
    artifact = make_sections(snapshot, workspace.recipe.corpus, mapper_for(workspace.settings))
    about, unreadable = artifact.about, unreadable_rows(artifact)
    files = (_row(ledger) for chapter in all_chapters(artifact) for ledger in chapter.files)
    return describe(
        SECTIONS,
        artifact,
        workspace.recipe,
        about["version"],
        {
            "chapters": about["chapters"],
            "sections": about["sections"],
            "words": about["words"],
            "pairs of original and improved text": about["pairs"],
            "bytes used": about["used"],
            "bytes left out": sum(about["left_out"].values()),
            "left out by reason": table([{"reason": name, "bytes": n} for name, n in about["left_out"].items()]),
            "sections removed": table([{"reason": name, "sections": n} for name, n in about["removed"].items()]),
            "files": table(files, snapshot.about["files"]),
        },
        [_readable(unreadable, workspace.recipe), _without_secrets(secret_findings(artifact), workspace.recipe)],
    )


def _row(ledger: FileLedger) -> dict[str, Any]:
    left_out = ", ".join(f"{name} {size}" for name, size in ledger.left_out.items())
    return {
        "file": ledger.path,
        "bytes": ledger.size,
        "used": ledger.used,
        "left out": left_out,
        "problem": ledger.problem or "",
    }


def _readable(unreadable: list[dict[str, Any]], recipe: Recipe) -> dg.AssetCheckResult:
    skip = recipe.corpus.unreadable == "skip"
    listed = _listed([f"{item['path']}: {item['reason']}" for item in unreadable])
    advice = (
        "They are left out, as the recipe says."
        if skip
        else "Fix or remove them, or set `corpus: {unreadable: skip}` in the recipe."
    )
    return dg.AssetCheckResult(
        check_name=READABLE.name,
        asset_key=SECTIONS.key,
        passed=skip or not unreadable,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{len(unreadable)} file(s) cannot be read. {advice}\n{listed}" if unreadable else None,
        metadata={"unreadable": table(unreadable)},
    )


def _without_secrets(findings: list[SecretFinding], recipe: Recipe) -> dg.AssetCheckResult:
    block = recipe.corpus.secrets == "block"
    advice = (
        "Remove it from the reports, or set `corpus: {secrets: warn}` in the recipe."
        if block
        else "Training continues; remove what should not be learned."
    )
    listed = _listed(
        [f"{f.source}, {f.heading or 'before the first heading'}, line {f.line}: {f.kind}" for f in findings]
    )
    return dg.AssetCheckResult(
        check_name=SECRETS.name,
        asset_key=SECTIONS.key,
        passed=not findings,
        severity=dg.AssetCheckSeverity.ERROR if block else dg.AssetCheckSeverity.WARN,
        description=f"{len(findings)} place(s) look like a key or personal data. {advice}\n{listed}"
        if findings
        else None,
        metadata={
            "findings": table([finding._asdict() for finding in findings]),
            **Counter(finding.kind for finding in findings),
        },
    )


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + more)


_MOST = 20
"""The most files or places that a failed check lists."""
