"""Reading JSON reports into texts by chapter and section.

The shape of a file is recognized by its keys, never by its name.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ft_dagster.corpus.files import CorpusError, Kind, decode, read_folder, shown
from ft_dagster.corpus.markdown import BOM, byte_length

_SECTION_ORDER = (
    "INTRODUCTION",
    "BACKGROUND KNOWLEDGE",
    "METHODOLOGY",
    "CURRENT RESEARCH",
    "RESULTS",
    "RESEARCH RECOMMENDATIONS",
    "DISCUSSION",
    "CONCLUSION",
    "REFERENCES",
)
"""The generator's own order, for sections in separate files, which do not state their position."""
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")
"""Matches characters that a JSON escape can express but a text file cannot contain."""
_MAX_DIGITS = 4_000
_CHAPTER_STEM = re.compile(r"(?P<chapter>chapter_\d+)(?:_.*)?")


@dataclass(frozen=True)
class JsonText:
    """The text of one section in a JSON report."""

    title: str
    text: str
    kind: Literal["improved", "draft"]
    place: int
    """Position in the chapter, as far as the file states it."""
    timestamp: str = ""
    """Timestamp as the generator wrote it. Of two versions, the later one is used."""
    score: float | None = None
    """Mean of the last panel scores, from 0 to 1; None if there are none."""
    original: str | None = None
    """The text that it was rewritten from, if the file contains it."""
    brief: tuple[str, ...] = ()
    """The points that the editor asked to improve, from all iterations in order: each one once, on a single line."""


@dataclass
class JsonReport:
    """The content of a JSON file: the texts of one chapter, and the bytes of everything else by reason."""

    chapter: str
    texts: list[JsonText] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def parse_report_json(data: bytes, name: str) -> JsonReport:
    """Parse one JSON report.

    Args:
        data: the file's bytes.
        name: the file's path within its report folder, without suffix. It names the chapter if the content does not.

    Returns:
        A JsonReport. The bytes of its titles and texts, plus those of `left_out`, are exactly the bytes of the file.

    Raises:
        ValueError: the data is not UTF-8 or not JSON, a key occurs twice, the shape is unknown, or a required text is
            missing.
    """
    content = _load(decode(data))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a JSON {_json_type(content)} where an object is due")
    if isinstance(content.get("final_result"), dict) and isinstance(content.get("metadata"), dict):
        report = _reviewed_section(content, name)
    elif isinstance(content.get("sections"), dict):
        report = _sections(content, name)
    else:
        keys = ", ".join(map(shown, list(content)[:6])) or "none"
        raise ValueError(
            "its keys fit no report: an object `sections`, or objects `metadata` and `final_result`, are due "
            f"(found: {keys})"
        )
    known = sum(byte_length(item.title) + byte_length(item.text) for item in report.texts)
    known += sum(report.left_out.values())
    report.left_out["JSON syntax"] += len(data) - known
    report.left_out = +report.left_out
    return report


def describe_content(kind: Kind, name: str, data: bytes) -> tuple[str, int]:
    """Return the chapter that a file belongs to, and the number of words in its text.

    A file that cannot be parsed is a chapter of its own and has no words. It is reported when its text is read.
    """
    if kind == "markdown":
        return name, len(data.split())
    try:
        report = parse_report_json(data, name)
    except ValueError:
        return name, 0
    return report.chapter, sum(len(text.text.split()) for text in report.texts)


def load_json_files(directory: str | Path) -> list[str]:
    """Return the improved text of every JSON report in a folder: one string per file, in which each section is
    `### NAME:\\n{text}\\n\\n`.

    First drafts are not improved text, so a file that contains only drafts is skipped.

    Raises:
        CorpusError: the folder is missing, contains no JSON file, or contains files that cannot be read (all of
            them are named).
    """
    folder = Path(directory)
    rendered, problems = [], []
    for path, text in read_folder(folder, "json"):
        try:
            report = parse_report_json(text.encode("utf-8"), path.relative_to(folder).with_suffix("").as_posix())
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        improved = [item for item in report.texts if item.kind == "improved"]
        if improved:
            rendered.append("".join(f"### {item.title}:\n{item.text}\n\n" for item in improved))
    if problems:
        raise CorpusError("Cannot read " + "; ".join(problems))
    return rendered


def chapter_of(name: str) -> str:
    """Return the chapter of a JSON file whose content does not state it: `part/chapter_3_draft` -> `part/chapter_3`."""
    path = Path(name)
    match = _CHAPTER_STEM.fullmatch(path.name)
    return (path.parent / (match["chapter"] if match else path.name)).as_posix()


def _load(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key '{shown(twice)}' is given twice in one object, so one text would be lost")
        return content

    try:
        return json.loads(text.removeprefix(BOM), object_pairs_hook=unique, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}: line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be a report") from error


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:  # parsing time is quadratic, and the message of Python's own limit names no next step
        raise ValueError(f"it holds a number of {len(digits)} digits, which no report needs; remove it")
    return int(digits)


def _sections(content: dict[str, Any], name: str) -> JsonReport:
    """Parse shapes 2a (a complete report, sections as objects) and 2b (a first draft, sections as strings)."""
    report = JsonReport(chapter_of(name))
    timestamp = content.get("timestamp")
    for place, (title, value) in enumerate(content["sections"].items()):
        _text(title, "the name of a section")
        kind: Literal["improved", "draft"] = "draft"
        text, original = value, None
        if isinstance(value, dict):
            if "improved" not in value:
                raise ValueError(f"sections.{shown(title)} has no key `improved`")
            kind, text, original = "improved", value["improved"], _text_or_none(value.get("original"))
            for key, other in value.items():
                if key != "improved":
                    _leave_out(report, other, "original text" if key == "original" else "metadata")
        report.texts.append(
            JsonText(
                title,
                _text(text, f"sections.{shown(title)}" + (".improved" if kind == "improved" else "")),
                kind,
                place,
                timestamp if isinstance(timestamp, str) else "",
                original=original,
            )
        )
    _leave_out(report, {key: value for key, value in content.items() if key != "sections"}, "metadata")
    return report


def _reviewed_section(content: dict[str, Any], name: str) -> JsonReport:
    """Parse shape 2c: one section with its review history."""
    metadata, result = content["metadata"], content["final_result"]
    chapter = metadata.get("chapter")
    if isinstance(chapter, bool) or not isinstance(chapter, (int, str)) or chapter == "":
        raise ValueError(f"metadata.chapter is {_json_type(chapter)}, a chapter's number or name is due")
    chapter = _text(str(chapter), "metadata.chapter")
    chapter_name = f"chapter_{chapter}" if chapter.isdecimal() else chapter
    report = JsonReport((Path(name).parent / chapter_name).as_posix())
    title = _text(metadata.get("section"), "metadata.section")
    iterations = content.get("iterations")
    timestamp = metadata.get("timestamp")
    rewritten = not metadata.get("skipped") and result.get("final_status") != "unchanged"
    report.texts.append(
        JsonText(
            title,
            _text(result.get("final_text"), "final_result.final_text"),
            "improved",
            _usual_place(title),
            timestamp if isinstance(timestamp, str) else "",
            _last_score(iterations),
            _text_or_none(result.get("original_text")) if rewritten else None,
            _points(iterations),
        )
    )
    _leave_out(report, {key: value for key, value in metadata.items() if key != "section"}, "metadata")
    _leave_out(report, iterations, "review history")
    for key, value in result.items():
        if key != "final_text":
            _leave_out(report, value, "original text" if key == "original_text" else "metadata")
    for key, value in content.items():
        if key not in ("metadata", "iterations", "final_result"):
            _leave_out(report, value, "original text" if key == "original_content" else "metadata")
    return report


def _usual_place(title: str) -> int:
    name = title.upper().strip()
    return _SECTION_ORDER.index(name) if name in _SECTION_ORDER else len(_SECTION_ORDER)


def _last_score(iterations: Any) -> float | None:
    last = iterations[-1] if isinstance(iterations, list) and iterations else None
    scores = last.get("panel_scores") if isinstance(last, dict) else None
    values = scores.values() if isinstance(scores, dict) else ()
    numbers = [value for value in values if isinstance(value, (int, float)) and 0 <= value <= 1]
    return sum(numbers) / len(numbers) if numbers else None


def _points(iterations: Any) -> tuple[str, ...]:
    found = [
        " ".join(point.split())
        for iteration in (iterations if isinstance(iterations, list) else ())
        if isinstance(iteration, dict) and isinstance(iteration.get("improvement_points"), list)
        for point in iteration["improvement_points"]
        if _text_or_none(point) is not None
    ]
    return tuple(dict.fromkeys(point for point in found if point))


def _text_or_none(value: Any) -> str | None:
    """Return an accompanying text, or None if it is not valid text; the section is then used without it."""
    return value if isinstance(value, str) and not _NOT_TEXT.search(value) else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_json_type(value)} where text is due")
    if match := _NOT_TEXT.search(value):
        raise ValueError(f"{where} holds \\u{ord(match[0]):04x}, which is not text; remove it")
    return value


def _leave_out(report: JsonReport, value: Any, reason: str) -> None:
    """Count every string in a value under a reason, except for keys, which are syntax."""
    report.left_out[reason] += sum(byte_length(text) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    values = [value]  # iterative, because JSON may be nested more deeply than Python's recursion limit
    while values:
        item = values.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            values.extend(item.values())
        elif isinstance(item, list):
            values.extend(item)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names[type(value)]
