"""The code blocks of the documentation: found in its pages, and run as a reader types them.

The word behind the fence determines what happens with a block:
    sh, python          run in the order of the page, in one folder and one environment
    yaml                a recipe, or parts of one
    dotenv              settings
    text, json, ...     shown only
    WORD no-run: REASON  neither run nor read; the reason says why
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from processes import end_inheriting

from ft_dagster.config.settings import Settings

PROJECT = Path(__file__).parents[2]
PAGES = [
    str(path.relative_to(PROJECT))
    for path in (
        *sorted(PROJECT.glob("*.md")),
        *sorted((PROJECT / "docs").rglob("*.md")),
        PROJECT / "ft_dagster/examples/README.md",
    )
]
RUN = {"sh", "python"}
CHECKED = {"yaml", "dotenv"}
SHOWN = {"text", "ini", "json", "toml", "markdown", "mermaid"}
DEMO = re.compile(r"^make demo\b", re.MULTILINE)
_INFO = re.compile(r"(?P<language>\w+)(?: no-run: (?P<reason>\S.*))?")
_SERVES = re.compile(r"\b(make|dagster) dev\b")
_OURS = ("FT_", "DAGSTER_", "HUGGINGFACE_", "HF_", "MLFLOW_", "MAKE", "MFLAGS", "COV_", "PYTEST_", "VIRTUAL_ENV")
_MARK = "PAGE_IN_FOLDER"
_MINUTES = 10
_SAY_WHICH = 'code=$?; [ $code = 0 ] || echo "The block at $BLOCK ended with $code."'


@dataclass(frozen=True)
class Block:
    """One code block of a page."""

    page: str
    line: int
    """The line of its opening fence, from 1."""
    info: str | None
    """The text behind the fence; None for a block that is indented instead."""
    code: str

    @property
    def language(self) -> str | None:
        """Its language; None if the text behind the fence is unknown."""
        found = _INFO.fullmatch(self.info or "")
        known = RUN | CHECKED | SHOWN
        return found["language"] if found and found["language"] in known else None

    @property
    def is_used(self) -> bool:
        """Whether it is run or its content is read."""
        return self.language in RUN | CHECKED and " no-run" not in str(self.info)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Return every code block of a page, including those in lists and quotations."""
    tokens = MarkdownIt().parse((PROJECT / page).read_text("utf-8"))
    return [
        Block(page, token.map[0] + 1, token.info.strip() if token.type == "fence" else None, token.content)
        for token in tokens
        if token.type in ("fence", "code_block") and token.map is not None
    ]


def used_blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in these languages that are run or read."""
    return [block for page in PAGES for block in blocks_of(page) if block.is_used and block.language in languages]


def copy_project(folder: Path) -> Path:
    """Make a fresh clone in a new folder, whose `.venv` is the environment that runs the tests.

    `.venv` is a folder of links that is marked as completely installed, so that `make` installs nothing.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".ready":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / ".ready").touch()
    return folder


def run_blocks(blocks: Sequence[Block], folder: Path, recipe: Path) -> str:
    """Run sh and python blocks, one after the other, in a copy of the project and return their output.

    The error names the block that failed and the end of its output. No process that a block started survives.

    Args:
        recipe: the recipe that is trained where a block does not name another.
    """
    script, output = folder.with_suffix(".sh"), folder.with_suffix(".txt")
    script.write_text(_script(blocks), "utf-8")
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=folder,
            env=_environment(folder, recipe),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * _MINUTES)
        finally:
            end_inheriting(_MARK, str(folder))
            process.wait()
    written = output.read_text("utf-8", errors="replace")
    assert code == 0, "\n".join(["", *written.splitlines()[-60:]])
    return written


def _script(blocks: Sequence[Block]) -> str:
    lines = [
        "set -euo pipefail",
        """trap 'code=$?; [ $code = 0 ] || echo "The block at $BLOCK ended with $code."' EXIT""",
    ]
    for block in blocks:
        lines.append(f"BLOCK={shlex.quote(str(block))}")
        if block.language == "python":
            lines.append(_here_document(".venv/bin/python -", block.code))
        elif _SERVES.search(block.code):
            server = Path(__file__).with_name("serve_block.py")
            lines.append(_here_document(f"{shlex.quote(sys.executable)} {shlex.quote(str(server))}", block.code))
        else:
            lines.append(block.code)
    return "\n".join(lines)


def _here_document(command: str, text: str) -> str:
    return f"{command} <<'END OF THE BLOCK'\n{text}END OF THE BLOCK"


def _environment(folder: Path, recipe: Path) -> dict[str, str]:
    """Return a reader's environment: without the test run's own settings, and without a network."""
    nowhere = "http://127.0.0.1:9"
    home = folder.with_suffix(".home")
    home.mkdir()
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)} | {
        _MARK: str(folder),
        "HOME": str(home),
        "PYTHONPATH": str(folder),
        "FT_CACHE": str(Settings().cache),  # the converted base is kept between test runs
        "FT_RECIPE": str(recipe),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1,localhost",
    }
