"""The page about errors explains the messages that the program prints, and no others."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "troubleshooting.md"
ERRORS = {
    "AdapterError",
    "BaseModelError",
    "CorpusError",
    "Failure",
    "LeaseError",
    "LineageError",
    "RecipeError",
    "ReleaseError",
    "ServeError",
    "SettingsError",
    "SkipReason",
    "StoreError",
    "TalkError",
    "TrackingError",
    "TrainingError",
    "UnknownRatesError",
    "WheelError",
    "_unhealthy",  # the reason why a step on another machine failed
}
GAP = "…"


def explained() -> list[str]:
    """Return the messages in the first column of the page's tables."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    return [row.split("`")[1] for row in rows]


def text_of(node: ast.expr) -> str:
    """Return a string of the program, with gaps in place of values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return GAP


def trees() -> Iterator[ast.Module]:
    for path in sorted((PROJECT / "ft_dagster").rglob("*.py")):
        yield ast.parse(path.read_text("utf-8"))


@cache
def said() -> str:
    """Return all strings of the program, one per line."""
    nodes = (node for tree in trees() for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant)))
    return "\n".join(map(text_of, nodes))


def test_the_page_explains_many_messages() -> None:
    assert len(explained()) > 40


@pytest.mark.parametrize("message", explained())
def test_every_explained_message_occurs_in_the_code(message: str) -> None:
    everything = said()
    pieces = [piece.strip() for piece in message.split(GAP)]
    missing = [piece for piece in pieces if piece and piece not in everything]
    assert not missing, "the message was reworded: say it so on the page, too"


def test_every_message_in_the_code_is_explained() -> None:
    known = [[piece.strip() for piece in message.split(GAP) if piece.strip()] for message in explained()]
    unexplained = [text for text in messages() if not any(all(p in text for p in pieces) for pieces in known)]
    assert not unexplained, "say on the page why it comes and what to do"


def messages() -> Iterator[str]:
    """Return the messages of errors that users can fix; those that only pass on another message are left out."""
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                text = text_of(node.args[0])
                if name in ERRORS and len(text.replace(GAP, "").strip()) > 8:
                    yield text
