"""The example report that the package brings, and a workspace that is filled with it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ft_dagster.corpus.files import CorpusError, FoundFile, find_reports, report_folders

EXAMPLE = Path(__file__).parents[1] / "examples"
"""Laid out like a workspace."""


def fill_with_example(workspace: Path) -> int:
    """Copy the example report into a workspace that holds no reports and that nothing was made from.

    A workspace that has at least one file of the example as it is shipped was filled before: what a person edited,
    added or removed since then stays as it is.

    Returns:
        How many files were copied; 0 where the example was there already.

    Raises:
        CorpusError: the workspace holds other reports, or what was made from others.
    """
    folders = [folder for _, folder in report_folders(workspace)]
    made = [workspace / name for name in (".ft", ".dagster")]
    present = [folder for folder in (*folders, *made) if _holds_something(folder)]
    if _holds_example(workspace):
        if folders[0] in present or made[0] in present:
            return 0
    elif present:
        raise CorpusError(
            f"The workspace {workspace} is not filled with the example report, because {present[0]} is there already "
            "and is not the example's. Name a new folder: `ft-dagster demo FOLDER`. To bring this workspace up to date "
            "as it is: `ft-dagster run`."
        )
    copied = 0
    for folder in reversed(folders):  # the Markdown chapters last: where they are, everything is
        if folder not in present:
            copied += _copy_whole(EXAMPLE / folder.relative_to(workspace), folder)
    return copied


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _holds_example(workspace: Path) -> bool:
    """Whether one of its files is as it is shipped."""
    pairs = ((workspace / path.relative_to(EXAMPLE), path) for path in _files(EXAMPLE))
    return any(found.is_file() and found.read_bytes() == path.read_bytes() for found, path in pairs)


def _files(workspace: Path) -> Iterator[Path]:
    return (workspace / found.path for found in find_reports(workspace) if isinstance(found, FoundFile))


def _copy_whole(source: Path, target: Path) -> int:
    """Copy the reports of a folder so that they appear all at once, also where the process is killed."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = [path for path in _files(EXAMPLE) if path.is_relative_to(source)]
    for path in files:
        copy = unfinished / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    unfinished.rename(target)  # which is missing, or an empty folder
    return len(files)
