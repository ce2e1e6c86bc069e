"""Files and texts for which a run stops before training, so that a plan can name them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.chapter import why_unreadable
from ft_dagster.corpus.files import SourceFile, shown
from ft_dagster.corpus.index import Scan
from ft_dagster.corpus.sections import secret_findings, unreadable_rows
from ft_dagster.store.local import Artifact


@dataclass(frozen=True)
class Refusal:
    """A file, or a text in it, for which a run stops before training."""

    path: str
    """The file, relative to the workspace."""
    reason: str


def refusals_in(sections: Artifact, options: Corpus) -> list[Refusal]:
    """Return what stops a run, according to the sections that it would make."""
    found = []
    if options.unreadable == "fail":
        found += [Refusal(row["path"], row["reason"]) for row in unreadable_rows(sections)]
    if options.secrets == "block":
        for item in secret_findings(sections):
            place = shown(item.heading) or "text before the first heading"
            found.append(Refusal(item.source, f"{place}, line {item.line}: {item.kind}"))
    return found


def refusals_without_parsing(
    workspace: Path, scan: Scan, changed: Iterable[SourceFile], before: Artifact | None, options: Corpus
) -> list[Refusal]:
    """Return what is known to stop a run where the changed files are too many to be parsed for a plan.

    Text that looks like a key is not searched for in the changed files.

    Args:
        workspace: the folder of the workspace.
        scan: the current reports.
        changed: files that are not in `before` in this form.
        before: the sections that were made last.
        options: the recipe's options for the corpus.
    """
    changed = list(changed)
    found = refusals_in(before, options) if before else []
    there = {file.path for file in scan.files} - {file.path for file in changed}
    found = [refusal for refusal in found if refusal.path in there]
    if options.unreadable == "fail":
        found += [Refusal(item.path, item.reason) for item in scan.unreadable]
        found += _unreadable(workspace, changed)
    return found


def _unreadable(workspace: Path, files: Iterable[SourceFile]) -> Iterator[Refusal]:
    for file in files:
        try:
            reason = why_unreadable(file, (workspace / file.path).read_bytes())
        except OSError:  # the file was removed after the scan
            continue
        if reason is not None:
            yield Refusal(file.path, reason)
