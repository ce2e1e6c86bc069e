"""Report JSON -> texts by chapter and section. The shape of a file is told by its keys, never by its name."""

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
"""The generator's own order: sections that come in files of their own do not say where they stand."""
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")
"""What a JSON escape can write and no text file can hold."""
_MOST_DIGITS = 4_000
_CHAPTER_STEM = re.compile(r"(?P<chapter>chapter_\d+)(?:_.*)?")


@dataclass(frozen=True)
class JsonText:
    """The text of one section, as a JSON report gives it."""

    title: str
    text: str
    kind: Literal["improved", "draft"]
    place: int
    """Where it stands in its chapter, as far as the file says."""
    timestamp: str = ""
    """As the generator wrote it; the later one of two versions counts."""
    score: float | None = None
    """Mean of the last panel scores, from 0 to 1, where there are any."""
    original: str | None = None
    """What it was rewritten from, where the file says so."""
    brief: tuple[str, ...] = ()
    """What the editor asked to improve: the points of all iterations in order, each once, each on one line."""


@dataclass
class JsonReport:
    """What a JSON file comes to: texts of one chapter, and the bytes of everything else by reason."""

    chapter: str
    texts: list[JsonText] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def parse_report_json(data: bytes, name: str) -> JsonReport:
    """Read one report file.

    Args:
        data: the file's bytes.
        name: the file's path within its folder, without suffix; it names the chapter where the content does not.

    Returns:
        JsonReport: the bytes of its texts' titles and texts and of `left_out` are the bytes of the file.

    Raises:
        ValueError: not UTF-8, not JSON, a key given twice, no shape that is known, or no text where text is due.
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
    """The chapter that a file speaks of, and the words of its text.

    What cannot be parsed is its own chapter and has no words; it is reported when it is read for its text.
    """
    if kind == "markdown":
        return name, len(data.split())
    try:
        report = parse_report_json(data, name)
    except ValueError:
        return name, 0
    return report.chapter, sum(len(text.text.split()) for text in report.texts)


def load_json_files(directory: str | Path) -> list[str]:
    """The improved text of every report JSON in a folder, one string a file: `### NAME:\\n{text}\\n\\n` a section.

    First drafts are not improved text and give nothing.

    Raises:
        CorpusError: the folder is missing, holds no JSON file, or a file in it cannot be read (all are named).
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
    """The chapter a JSON file belongs to when its content does not say: `part/chapter_3_draft` -> `part/chapter_3`."""
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
        return json.loads(text.removeprefix(BOM), object_pairs_hook=unique, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}: line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply to be a report") from error


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:  # time to read it grows with the square of them, and Python's own refusal is its own
        raise ValueError(f"it holds a number of {len(digits)} digits, which no report needs; remove it")
    return int(digits)


def _sections(content: dict[str, Any], name: str) -> JsonReport:
    """Shapes 2a (a whole report, sections as objects) and 2b (a first draft, sections as strings)."""
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
                    _leave(report, other, "original text" if key == "original" else "metadata")
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
    _leave(report, {key: value for key, value in content.items() if key != "sections"}, "metadata")
    return report


def _reviewed_section(content: dict[str, Any], name: str) -> JsonReport:
    """Shape 2c: one section with its review history."""
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
    _leave(report, {key: value for key, value in metadata.items() if key != "section"}, "metadata")
    _leave(report, iterations, "review history")
    for key, value in result.items():
        if key != "final_text":
            _leave(report, value, "original text" if key == "original_text" else "metadata")
    for key, value in content.items():
        if key not in ("metadata", "iterations", "final_result"):
            _leave(report, value, "original text" if key == "original_content" else "metadata")
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
    """A text beside the one that counts: where it is none, the section is used without it."""
    return value if isinstance(value, str) and not _NOT_TEXT.search(value) else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_json_type(value)} where text is due")
    if match := _NOT_TEXT.search(value):
        raise ValueError(f"{where} holds \\u{ord(match[0]):04x}, which is not text; remove it")
    return value


def _leave(report: JsonReport, value: Any, reason: str) -> None:
    """Count every string in a value, keys excepted (they are syntax), under a reason."""
    report.left_out[reason] += sum(byte_length(text) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    values = [value]  # not a recursion: JSON may be nested more deeply than functions may be called
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
