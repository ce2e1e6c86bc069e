"""Finding and reading the report files, and stating which of them cannot be read and why."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from ft_dagster.errors import UserError
from ft_dagster.store.hashing import digest

Kind = Literal["markdown", "json"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {"markdown": (".md", ".markdown"), "json": (".json",)}


class CorpusError(UserError):
    """The reports cannot be used as they are. The message names the file, the reason and the next step."""


class SourceFile(NamedTuple):
    """One report file whose bytes were read."""

    path: str
    """Path relative to the workspace, with forward slashes: `chapter_markdowns/chapter_1.md`."""
    name: str
    """Path relative to its report folder, without suffix: `chapter_1`. It identifies a Markdown chapter."""
    kind: Kind
    size: int
    """Size in bytes."""
    sha256: str
    chapter: str
    """The chapter that the file belongs to: its name, unless it is JSON that states another chapter."""
    words: int
    """Number of words in its text, including parts that are left out; shown to users as a measure of size."""


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that counts as a report but cannot be used."""

    path: str
    reason: str
    size: int = 0
    """Size in bytes, as far as it is known."""


def report_folders(workspace: Path) -> list[tuple[Kind, Path]]:
    """Return the folders of a workspace that contain its reports."""
    return [("markdown", workspace / "chapter_markdowns"), ("json", workspace / "outputs" / "consolidated")]


class FoundFile(NamedTuple):
    """A report file that was found but has not been read yet."""

    path: str
    """Path relative to the workspace."""
    name: str
    kind: Kind
    status: os.stat_result


def find_reports(workspace: Path) -> Iterator[FoundFile | Unreadable]:
    """Yield every report file in the workspace, in a fixed order.

    Hidden files and folders are not reports. The following are yielded as Unreadable: a symbolic link that leads out of
    its report folder, a symbolic link to a folder, anything that is not a regular file (it is never opened), and a
    folder that cannot be listed.
    """
    for kind, folder in report_folders(workspace):
        yield from _find(kind, str(folder), "", _relative(folder, workspace))


def _find(kind: Kind, root: str, inside: str, shown: str) -> Iterator[FoundFile | Unreadable]:
    """Yield the files of one folder: `inside` is its path in the report folder `root`, empty or with a trailing slash.

    Paths are plain strings, and the status of each file is read once, because a hundred thousand files are scanned
    several times a minute.
    """
    try:
        with os.scandir(root + "/" + inside) as listing:
            entries = sorted(listing, key=attrgetter("name"))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # a workspace need not have both kinds of reports
            yield Unreadable(_printable(shown), f"the folder cannot be listed: {error.strerror}")
        return
    folders = []
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            continue
        path = f"{shown}/{name}"
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112
            if entry.is_symlink():
                reason = "a symbolic link to a folder is not followed; put the chapters themselves here"
                yield Unreadable(_printable(path), reason)
            else:
                folders.append(name)
        elif name.lower().endswith(SUFFIXES[kind]):
            try:
                status = entry.stat()
            except OSError as error:
                gone = isinstance(error, FileNotFoundError) and not entry.is_symlink()  # deleted since it was listed
                if not gone:  # a broken or circular link, or a folder without search permission
                    yield Unreadable(_printable(path), f"it cannot be opened: {error.strerror}")
                continue
            if stat.S_ISREG(status.st_mode) and path.isascii() and not entry.is_symlink():  # nearly all files
                yield FoundFile(path, inside + name.rpartition(".")[0], kind, status)
            elif problem := _why_not_opened(entry.path, root, status, entry.is_symlink()):
                yield Unreadable(_printable(path), problem)
            else:
                yield FoundFile(path, inside + name.rpartition(".")[0], kind, status)
    for name in folders:
        yield from _find(kind, root, f"{inside}{name}/", f"{shown}/{name}")


def read_file(path: Path) -> bytes | str:
    """Return the bytes of a report file as they were at one instant, or the reason why it cannot be read.

    Raises:
        FileNotFoundError: the file no longer exists.
    """
    try:
        return _read_settled(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        return error.strerror or str(error)


def content_version(files: list[SourceFile], unreadable: list[Unreadable]) -> str:
    """Return the data version of a set of reports, a hash of their names within the report folders and their contents.

    It does not depend on modification times, on the order of reading, or on the location of the workspace.
    """
    lines = sorted(f"{file.kind} {file.sha256} {file.path}" for file in files)
    return digest(["\0".join(lines), sorted([item.path, item.reason] for item in unreadable)])


def require_reports(workspace: Path, found: int) -> None:
    """Raise CorpusError, with instructions for adding reports, if `found`, the number of report files, is 0."""
    if not found:
        raise CorpusError(
            f"No chapters in the workspace {workspace}. Put Markdown chapters into "
            f"{workspace / 'chapter_markdowns'} or report JSON into {workspace / 'outputs' / 'consolidated'}, "
            "name another workspace with FT_WORKSPACE, or try `ft-dagster demo`, which comes with an example report."
        )


def decode(data: bytes) -> str:
    """Return the text of a report file in UTF-8. A byte-order mark, if there is one, stays in the text.

    Raises:
        ValueError: the data has another encoding or is binary. The message states the reason and the next step.
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


def shown(text: str, longest: int = 80) -> str:
    """Return a quotation from a report for a message: shortened, with control characters and lone surrogates escaped.

    >>> shown("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    cut = text if len(text) <= longest else text[:longest] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def load_text_files(directory: str | Path) -> list[str]:
    """Return the full text of every Markdown file in a folder and its subfolders, in the order of their names.

    Raises:
        CorpusError: the folder is missing, contains no Markdown file, or contains files that cannot be read (all of
            them are named).
    """
    return [text for _, text in read_folder(Path(directory), "markdown")]


def read_folder(folder: Path, kind: Kind) -> list[tuple[Path, str]]:
    """Return the path and the text of every file of one kind in a folder and its subfolders, in order.

    Raises:
        CorpusError: as in `load_text_files`.
    """
    if not folder.is_dir():
        raise CorpusError(f"The folder {folder} does not exist. Create it and put {kind} chapters into it.")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES[kind])
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise CorpusError(f"The folder {folder} contains no {'/'.join(SUFFIXES[kind])} file.")
    texts, problems = [], []
    for path in paths:
        try:
            if reason := _why_not_opened(str(path), str(folder), path.stat(), path.is_symlink()):
                raise ValueError(reason)
            texts.append((path, decode(path.read_bytes())))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise CorpusError("Cannot read " + "; ".join(problems))
    return texts


def _read_settled(path: Path, attempts: int = 5) -> bytes:
    """Return the bytes of a file that did not change while it was read. Raises OSError if it kept changing."""
    for _ in range(attempts):
        before = path.stat()
        data = path.read_bytes()
        after = path.stat()
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size) and len(data) == after.st_size:
            return data
    raise OSError(0, "it kept changing while it was read; try again when it has been written")


def _why_not_opened(path: str, folder: str, status: os.stat_result, is_link: bool) -> str | None:
    """Return the reason why a path within a report folder is not opened, or None if it can be opened."""
    if is_link and not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        return "a symbolic link that leads out of the report folder is not followed; copy the file here"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file, so it is not opened"
    try:
        path[len(folder) :].encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return None


def _relative(path: Path, workspace: Path) -> str:
    return _printable(path.relative_to(workspace).as_posix())


def _printable(name: str) -> str:
    """Return a file name as text that can be written anywhere; a byte that is not UTF-8 becomes `\\xe9` or similar."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
