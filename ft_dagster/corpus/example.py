"""Filling a workspace with the example report that the package contains."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ft_dagster.corpus.files import CorpusError, FoundFile, find_reports, report_folders

EXAMPLE = Path(__file__).parents[1] / "examples"
"""Folder of the example report, with the layout of a workspace."""


def fill_with_example(workspace: Path) -> int:
    """Copy the example report into a workspace that contains no reports and no results made from reports.

    A workspace that contains at least one unmodified file of the example was filled before. Files that a user has
    edited, added or removed since then stay as they are.

    Returns:
        The number of files copied; 0 if the workspace already contained the example.

    Raises:
        CorpusError: the workspace contains other reports, or results made from other reports.
    """
    folders = [folder for _, folder in report_folders(workspace)]
    made = [workspace / name for name in (".ft", ".dagster")]
    present = [folder for folder in (*folders, *made) if _has_entries(folder)]
    if _has_example_file(workspace):
        if folders[0] in present or made[0] in present:
            return 0
    elif present:
        raise CorpusError(
            f"The workspace {workspace} is not filled with the example report, because {present[0]} already exists and "
            "is not part of the example. Name a new folder: `ft-dagster demo FOLDER`. To bring this workspace up to "
            "date as it is: `ft-dagster run`."
        )
    copied = 0
    for folder in reversed(folders):  # the Markdown chapters last: once they exist, the copy is complete
        if folder not in present:
            copied += _copy_reports(EXAMPLE / folder.relative_to(workspace), folder)
    return copied


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _has_example_file(workspace: Path) -> bool:
    """Whether the workspace contains an unmodified file of the example."""
    pairs = ((workspace / path.relative_to(EXAMPLE), path) for path in _files(EXAMPLE))
    return any(found.is_file() and found.read_bytes() == path.read_bytes() for found, path in pairs)


def _files(workspace: Path) -> Iterator[Path]:
    return (workspace / found.path for found in find_reports(workspace) if isinstance(found, FoundFile))


def _copy_reports(source: Path, target: Path) -> int:
    """Copy the reports of a folder so that they appear all at once, even if the process is killed."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = [path for path in _files(EXAMPLE) if path.is_relative_to(source)]
    for path in files:
        copy = unfinished / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    unfinished.rename(target)  # the target is missing, or an empty folder
    return len(files)
