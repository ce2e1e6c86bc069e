"""The report files: which there are, what is in them, which cannot be read and why."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ft_dagster.store import digest

Kind = Literal["markdown", "json"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {"markdown": (".md", ".markdown"), "json": (".json",)}


class CorpusError(Exception):
    """The reports cannot be used as they are; the message names the file, the reason and the next step."""


@dataclass(frozen=True)
class SourceFile:
    """One report file whose bytes were read."""

    path: str
    """Relative to the workspace, with forward slashes: `chapter_markdowns/chapter_1.md`."""
    name: str
    """Relative to its report folder, without suffix: `chapter_1`; the identity of a Markdown chapter."""
    kind: Kind
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Unreadable:
    """A file that counts as a report but cannot be used."""

    path: str
    reason: str
    size: int = 0
    """Bytes, as far as known."""


def report_folders(workspace: Path) -> list[tuple[Kind, Path]]:
    """Where a workspace keeps its reports."""
    return [("markdown", workspace / "chapter_markdowns"), ("json", workspace / "outputs" / "consolidated")]


def find_reports(workspace: Path) -> Iterator[tuple[Kind, Path, Path] | Unreadable]:
    """Every report file under the workspace, in a fixed order, as (kind, report folder, path).

    Hidden files and folders are not reports. A symbolic link that leads out of its report folder, a link to a
    folder, what is not a regular file (never opened), and a folder that cannot be listed come back as Unreadable.
    """
    for kind, folder in report_folders(workspace):
        problems: list[OSError] = []
        for parent, folders, names in os.walk(folder, onerror=problems.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = Path(parent)
            for name in folders:
                if (here / name).is_symlink():
                    yield Unreadable(
                        _relative(here / name, workspace),
                        "a symbolic link to a folder is not followed; put the chapters themselves here",
                    )
            for name in sorted(names):
                path = here / name
                if name.startswith(".") or not name.lower().endswith(SUFFIXES[kind]):
                    continue
                if reason := _why_not_opened(path, folder):
                    yield Unreadable(_relative(path, workspace), reason)
                else:
                    yield kind, folder, path
        for problem in problems:
            if not isinstance(problem, FileNotFoundError):  # a workspace need not have both kinds of reports
                yield Unreadable(
                    _relative(Path(problem.filename), workspace), f"the folder cannot be listed: {problem.strerror}"
                )


def read_reports(workspace: Path) -> Iterator[tuple[SourceFile, bytes] | Unreadable]:
    """Every report file with its bytes, one at a time, in the order of find_reports."""
    for found in find_reports(workspace):
        if isinstance(found, Unreadable):
            yield found
            continue
        yield read_report(*found, workspace)


def read_report(kind: Kind, folder: Path, path: Path, workspace: Path) -> tuple[SourceFile, bytes] | Unreadable:
    """One report file with its bytes, as it was at one instant."""
    try:
        data = _read_settled(path)
    except OSError as error:
        return Unreadable(_relative(path, workspace), error.strerror or str(error))
    name = path.relative_to(folder).with_suffix("").as_posix()
    return SourceFile(_relative(path, workspace), name, kind, len(data), digest(data)), data


def content_version(files: list[SourceFile], unreadable: list[Unreadable]) -> str:
    """The data version of a set of reports: names within the report folders and contents, nothing else.

    Not modification times, not the order of reading, not where the workspace is.
    """
    return digest(
        {
            "files": sorted([file.kind, file.path, file.sha256] for file in files),
            "unreadable": sorted([item.path, item.reason] for item in unreadable),
        }
    )


def require_reports(workspace: Path) -> None:
    """Raise CorpusError, saying what to put where, if the workspace holds no report file at all."""
    if next(find_reports(workspace), None) is None:
        raise CorpusError(
            f"No chapters in the workspace {workspace}. Put Markdown chapters into "
            f"{workspace / 'chapter_markdowns'} or report JSON into {workspace / 'outputs' / 'consolidated'}, "
            "name another workspace with FT_WORKSPACE, or try `make demo`, which brings a report of its own."
        )


def decode(data: bytes) -> str:
    """The text of a report file: UTF-8, with or without a byte-order mark (which stays in the text).

    Raises ValueError, with the reason and the next step, for other encodings and for binary data.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16, not UTF-8; save it again as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; save it again as UTF-8 "
            "(Latin-1 and Windows-1252 files are common causes)"
        ) from error
    if "\x00" in text:
        raise ValueError(f"it holds a NUL at character {text.index(chr(0))}: binary data, not text")
    return text


def load_text_files(directory: str | Path) -> list[str]:
    """The full text of every Markdown file in a folder and its sub-folders, in order of their names.

    Raises:
        CorpusError: the folder is missing, holds no Markdown file, or a file in it cannot be read (all are named).
    """
    return [text for _, text in read_folder(Path(directory), "markdown")]


def read_folder(folder: Path, kind: Kind) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise CorpusError(f"The folder {folder} does not exist. Create it and put {kind} chapters into it.")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES[kind])
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise CorpusError(f"The folder {folder} holds no {'/'.join(SUFFIXES[kind])} file.")
    texts, problems = [], []
    for path in paths:
        try:
            if reason := _why_not_opened(path, folder):
                raise ValueError(reason)
            texts.append((path, decode(path.read_bytes())))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise CorpusError("Cannot read " + "; ".join(problems))
    return texts


def _read_settled(path: Path, attempts: int = 5) -> bytes:
    """Bytes of a file that did not change while it was read."""
    for _ in range(attempts):
        before = path.stat()
        data = path.read_bytes()
        after = path.stat()
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size) and len(data) == after.st_size:
            return data
    raise OSError(0, "it kept changing while it was read; try again when it has been written")


def _why_not_opened(path: Path, folder: Path) -> str | None:
    """Why a path within a report folder is not even opened, if so."""
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        return f"it cannot be opened: {error.strerror}"  # among others, a link that leads nowhere or to itself
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return "a symbolic link that leads out of the report folder is not followed; copy the file here"
    if not is_regular:
        return "not a regular file, so it is not opened"
    name = str(path.relative_to(folder))
    if _printable(name) != name:
        return "its name is not UTF-8; rename it"
    return None


def _relative(path: Path, workspace: Path) -> str:
    return _printable(path.relative_to(workspace).as_posix())


def _printable(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes of it that are not UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
