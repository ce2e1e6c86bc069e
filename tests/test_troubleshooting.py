"""Every message that the page about errors explains is one that the program says."""

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
    "_unhealthy",  # why a step on another machine failed
}
GAP = "…"


def explained() -> list[str]:
    """The messages in the first column of the page's tables."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    return [row.split("`")[1] for row in rows]


def text_of(node: ast.expr) -> str:
    """A string of the program, with gaps where values stand."""
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
    """All strings of the program, one a line."""
    nodes = (node for tree in trees() for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant)))
    return "\n".join(map(text_of, nodes))


def test_there_are_messages() -> None:
    assert len(explained()) > 40


@pytest.mark.parametrize("message", explained())
def test_a_message_that_is_explained_is_said(message: str) -> None:
    everything = said()
    pieces = [piece.strip() for piece in message.split(GAP)]
    missing = [piece for piece in pieces if piece and piece not in everything]
    assert not missing, "the message was reworded: say it so on the page, too"


def test_no_message_is_left_out() -> None:
    known = [[piece.strip() for piece in message.split(GAP) if piece.strip()] for message in explained()]
    unexplained = [text for text in messages() if not any(all(p in text for p in pieces) for pieces in known)]
    assert not unexplained, "say on the page why it comes and what to do"


def messages() -> Iterator[str]:
    """What errors that people can fix say; those that only pass on another message are left out."""
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                text = text_of(node.args[0])
                if name in ERRORS and len(text.replace(GAP, "").strip()) > 8:
                    yield text
