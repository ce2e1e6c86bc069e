"""Coverage-guided search for bytes that break what must hold, with atheris.

    python -m fuzz.targets markdown|json|tokens|secrets [libFuzzer's options, such as -runs=400000 -max_len=400]

What it finds is written to a file crash-...; make a test of it in tests/corpus/test_hostile.py.
"""

import json
import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["ft_dagster.corpus", "ft_dagster.dataset", "markdown_it", "mdit_py_plugins"]):
    from ft_dagster.config.recipe import Corpus
    from fuzz.invariants import CONTROL, check_json, check_markdown, check_secrets, check_tokens

PIECES = (
    *CONTROL,
    *("# ", "## ", "### Citation Accuracy Analysis\n", "## References\n", "---\n", "\n\n", "\r", "\r\n", "\t", "\x0b"),
    *(
        "```\n",
        "~~~\n",
        "    ",
        "> ",
        "- ",
        "1. ",
        "| a | b |\n|---|---|\n",
        "<!--",
        "-->",
        "<div>",
        "<script>",
        "{#a}",
    ),
    *(
        "`",
        "*",
        "_",
        "[",
        "](",
        "![",
        "&amp;",
        "\\",
        "\ufeff",
        "\u2028",
        "\u0085",
        "é",
        "🎉",
        "\u2581",
        "text",
        "# Chapter 7\n",
    ),
)


_OPTIONS = [Corpus(bibliographies=bool(n & 1), review_blocks=bool(n & 2)) for n in range(4)]
_JSON_OPTIONS = [Corpus(drafts=bool(n & 1), minimum_score=0.5 if n & 2 else None) for n in range(4)]


def markdown(data: bytes) -> None:
    """Bytes as they come, and pieces of Markdown put together."""
    if not data:
        return
    first, rest = data[0], data[1:]
    check_markdown(rest if first & 4 else assembled(rest).encode(), _OPTIONS[first & 3])


def report(data: bytes) -> None:
    """Bytes as they come, and texts in the shapes that reports have."""
    if not data:
        return
    first, rest = data[0], data[1:]
    text, other = assembled(rest), rest.decode("utf-8", "surrogateescape")
    shapes: dict[int, object] = {
        1: {"sections": {other: {"improved": text, "original": other}, "A": {"improved": other}}},
        2: {"sections": {"A": text, "REFERENCES:": other}, "timestamp": other},
        3: {
            "metadata": {"chapter": len(rest) % 3 or other, "section": text[:8] or "A", "timestamp": other},
            "iterations": [{"panel_scores": {"a": first / 255}, "improvement_points": [other, None]}],
            "final_result": {"final_text": text, "original_text": other},
        },
    }
    shape = shapes.get(first & 3)
    data = rest if shape is None else json.dumps(shape, ensure_ascii=bool(first & 4)).encode("utf-8", "surrogatepass")
    check_json(data, _JSON_OPTIONS[first >> 3 & 3])


def tokens(data: bytes) -> None:
    """Text around and within the spelling of control tokens."""
    check_tokens(assembled(data))


def secrets(data: bytes) -> None:
    """What is searched for keys and personal data."""
    check_secrets(assembled(data))


def assembled(data: bytes) -> str:
    """Bytes below 128 as they are, those above as pieces."""
    return "".join(chr(byte) if byte < 128 else PIECES[(byte - 128) % len(PIECES)] for byte in data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "markdown": markdown,
    "json": report,
    "tokens": tokens,
    "secrets": secrets,
}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
