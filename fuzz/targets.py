"""Coverage-guided fuzzing with atheris: search for bytes that violate an invariant.

    python -m fuzz.targets markdown|json|tokens|secrets [libFuzzer's options, such as -runs=400000 -max_len=400]

An input that violates an invariant is written to a file named crash-...; turn it into a test in
tests/corpus/test_hostile.py.
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
    """Check Markdown: either the bytes unchanged, or pieces of Markdown that the bytes select."""
    if not data:
        return
    first, rest = data[0], data[1:]
    check_markdown(rest if first & 4 else assembled(rest).encode(), _OPTIONS[first & 3])


def report(data: bytes) -> None:
    """Check JSON reports: either the bytes unchanged, or texts in one of the shapes that reports have."""
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
    """Check the tokens of text that contains control tokens, in full or in part."""
    check_tokens(assembled(data))


def secrets(data: bytes) -> None:
    """Check the search for keys and personal data."""
    check_secrets(assembled(data))


def assembled(data: bytes) -> str:
    """Return the text that the bytes stand for: each byte below 128 is a character, any other selects one of PIECES."""
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
