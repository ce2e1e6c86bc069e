"""Report JSON becomes texts: the shapes, which text is used, and what is reported about files of no known shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.files import CorpusError
from ft_dagster.corpus.report_json import JsonReport, JsonText, chapter_of, load_json_files, parse_report_json


def as_bytes(content: Any) -> bytes:
    return json.dumps(content).encode()


def reviewed(**changes: Any) -> dict[str, Any]:
    """Return a reviewed section (shape 2c)."""
    return {
        "metadata": {"chapter": 3, "section": "CURRENT RESEARCH", "timestamp": "2025-10-14", "skipped": False},
        "iterations": [
            {"type": "baseline", "text": {"before": "old", "after": "new"}, "panel_scores": {"clarity": 0.1}},
            {"type": "rewrite", "improvement_points": ["say why"], "panel_scores": {"clarity": 0.5, "structure": 1}},
        ],
        "final_result": {"original_text": "old", "final_text": "newer", "final_status": "improved"},
    } | changes


def problem(data: bytes) -> str:
    with pytest.raises(ValueError) as error:
        parse_report_json(data, "chapter_1")
    return str(error.value)


def accounted(report: JsonReport) -> int:
    return sum(len((item.title + item.text).encode()) for item in report.texts) + sum(report.left_out.values())


def test_a_whole_report_gives_its_improved_texts_in_its_order() -> None:
    content = {
        "timestamp": "2025",
        "sections": {
            "RESULTS": {"original": "öld", "improved": "nëw", "note": "ok"},
            "INTRODUCTION": {"improved": "x"},
        },
    }
    data = as_bytes(content)
    report = parse_report_json(data, "part/whole report")
    assert report.chapter == "part/whole report"
    assert report.texts == [
        JsonText("RESULTS", "nëw", "improved", 0, "2025", original="öld"),
        JsonText("INTRODUCTION", "x", "improved", 1, "2025"),
    ]
    assert report.left_out == {"original text": 4, "metadata": 6, "JSON syntax": len(data) - 4 - 6 - 7 - 4 - 13}


def test_the_texts_of_a_first_draft_are_drafts() -> None:
    content = {"question": "Why?", "timestamp": 5, "sections": {"A": "a", "B": ""}, "referenced_papers": {"1": ["P"]}}
    report = parse_report_json(as_bytes(content), "chapter_4_draft")
    assert report.chapter == "chapter_4"
    assert report.texts == [JsonText("A", "a", "draft", 0), JsonText("B", "", "draft", 1)]
    assert report.left_out["metadata"] == len("Why?P")
    assert accounted(report) == len(as_bytes(content))


@pytest.mark.parametrize("status", ["improved", "unchanged"])
def test_a_reviewed_section_gives_its_final_text_with_its_place_time_and_last_score(status: str) -> None:
    content = reviewed()
    content["final_result"]["final_status"] = status
    report = parse_report_json(as_bytes(content), "part/chapter_9_x_consolidated")
    assert report.chapter == "part/chapter_3"
    original = "old" if status == "improved" else None
    assert report.texts == [
        JsonText("CURRENT RESEARCH", "newer", "improved", 3, "2025-10-14", 0.75, original, ("say why",))
    ]
    syntax = report.left_out.pop("JSON syntax")
    assert report.left_out == {
        "review history": len("baselineoldnewrewritesay why"),
        "original text": len("old"),
        "metadata": len("2025-10-14" + status),
    }
    assert accounted(report) + syntax == len(as_bytes(content))


def test_a_skipped_section_gives_its_preserved_text() -> None:
    content = {
        "metadata": {"chapter": "4", "section": "REFERENCES", "skipped": True},
        "original_content": "[1] Smith.",
        "final_result": {"final_text": "[1] Smith.", "status": "preserved"},
    }
    report = parse_report_json(as_bytes(content), "x")
    assert report.chapter == "chapter_4"
    assert report.texts == [JsonText("REFERENCES", "[1] Smith.", "improved", 8)]
    assert (report.left_out["original text"], report.left_out["metadata"]) == (10, len("4preserved"))


def test_a_chapter_may_have_a_name_and_a_section_an_unusual_title() -> None:
    metadata = {"chapter": "Rivers", "section": "On deltas", "timestamp": 7}
    report = parse_report_json(as_bytes(reviewed(metadata=metadata)), "x")
    assert report.chapter == "Rivers"
    assert (report.texts[0].place, report.texts[0].timestamp) == (9, "")


@pytest.mark.parametrize(
    ("iterations", "score"),
    [
        (None, None),
        ([], None),
        ({"0": 1}, None),
        (["x"], None),
        ([{"panel_scores": None}], None),
        ([{"panel_scores": {"clarity": "high"}}], None),
        ([{"panel_scores": {"a": 0.25, "b": 0.75, "c": None}}], 0.5),
        ([{"panel_scores": {"a": 10**400, "b": float("nan"), "c": 7, "d": 0.5}}], 0.5),
        ([{"panel_scores": {"a": 1}}, {}], None),
    ],
)
def test_the_score_is_the_mean_of_the_last_panel_scores_where_there_are_any(
    iterations: Any, score: float | None
) -> None:
    assert parse_report_json(as_bytes(reviewed(iterations=iterations)), "x").texts[0].score == score


@pytest.mark.parametrize(
    ("name", "chapter"),
    [
        ("chapter_3", "chapter_3"),
        ("chapter_3_draft", "chapter_3"),
        ("a b/chapter_12_x_consolidated", "a b/chapter_12"),
        ("chapter_3.v2", "chapter_3.v2"),
        ("chapter_one_draft", "chapter_one_draft"),
        ("Überblick", "Überblick"),
    ],
)
def test_a_file_name_gives_the_chapter_where_the_content_does_not(name: str, chapter: str) -> None:
    assert chapter_of(name) == chapter


def test_the_keys_determine_the_kind_of_report_and_a_byte_order_mark_is_syntax() -> None:
    content = reviewed(sections={"A": "draft"})
    data = b"\xef\xbb\xbf" + as_bytes(content)
    report = parse_report_json(data, "chapter_3_draft")
    assert [item.kind for item in report.texts] == ["improved"]
    assert accounted(report) == len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is not JSON: Expecting value: line 1 column 1"),
        (b'{"sections": {"A": "a', "it is not JSON: Unterminated string starting at: line 1 column 20"),
        (b'{\n"sections": {"A": "a"},\n', "it is not JSON: Expecting property name enclosed in double quotes"),
        (b"[]", "it holds a JSON list where an object is due"),
        (b"null", "it holds a JSON null where an object is due"),
        (b"1.5", "it holds a JSON number where an object is due"),
        (b"[" * 100_000, "it is nested too deeply to be a report"),
        (b'{"x":' * 100_000, "it is nested too deeply to be a report"),
        (
            b"{}",
            "its keys fit no report: an object `sections`, or objects `metadata` and `final_result`, are due "
            "(found: none)",
        ),
        (b'{"sections": [], "b": 1}', "(found: sections, b)"),
        (b'{"metadata": {}, "final_result": null}', "(found: metadata, final_result)"),
        (b'{"sections": {"A": null}}', "sections.A is null where text is due"),
        (b'{"sections": {"A": ["a"]}}', "sections.A is list where text is due"),
        (b'{"sections": {"A": {"improved": null}}}', "sections.A.improved is null where text is due"),
        (b'{"sections": {"A": {"original": "a"}}}', "sections.A has no key `improved`"),
        (b'{"sections": {"A": "a", "A": "b"}}', "the key 'A' is given twice in one object, so one text would be lost"),
        (b'{"sections": {}, "x": [{"k": 1, "k": 1}]}', "the key 'k' is given twice"),
        (as_bytes(reviewed(metadata={"section": "A"})), "metadata.chapter is null, a chapter's number or name is due"),
        (as_bytes(reviewed(metadata={"chapter": True})), "metadata.chapter is boolean, a chapter's number"),
        (as_bytes(reviewed(metadata={"chapter": ""})), "metadata.chapter is string, a chapter's number"),
        (as_bytes(reviewed(metadata={"chapter": 1.5})), "metadata.chapter is number, a chapter's number"),
        (as_bytes(reviewed(metadata={"chapter": 1})), "metadata.section is null where text is due"),
        (as_bytes(reviewed(final_result={"final_text": {}})), "final_result.final_text is object where text is due"),
        (rb'{"sections": {"A": "a\ud83d"}}', r"sections.A holds \ud83d, which is not text; remove it"),
        (rb'{"sections": {"A\u0000": "a"}}', r"the name of a section holds \u0000, which is not text; remove it"),
        (as_bytes(reviewed(metadata={"chapter": "\udc80"})), r"metadata.chapter holds \udc80, which is not text"),
        (b'{"sections": {"A": "caf\xe9"}}', "byte 23 (0xe9) is not UTF-8; save it again as UTF-8"),
        ("{}".encode("utf-16"), "it is UTF-16, not UTF-8; save it again as UTF-8"),
    ],
)
def test_a_file_that_is_not_a_report_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    assert reason in problem(data)


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (rb'{"\ud800": 1}', r"(found: \ud800)"),
        (rb'{"\u001b]0;x\u0007\n": 1}', r"(found: \x1b]0;x\x07\n)"),
        (b'{"' + b"k" * 1_000_000 + b'": 1}', f"(found: {'k' * 80}...)"),
        (rb'{"sections": {"\u001b[2J": 1}}', r"sections.\x1b[2J is number where text is due"),
        (rb'{"\ud800": 1, "\ud800": 2}', r"the key '\ud800' is given twice in one object, so one text would be lost"),
    ],
    ids=["half a character", "orders to a terminal", "a long key", "the name of a section", "a key given twice"],
)
def test_text_quoted_in_a_refusal_is_short_and_can_be_written_anywhere(data: bytes, end: str) -> None:
    assert problem(data).endswith(end)


def test_nesting_is_either_too_deep_to_read_or_accounted_for() -> None:
    for depth in (*range(800, 1100), 2_000, 5_000, 9_000, 50_000):
        data = b'{"sections": {}, "x": ' + b"[" * depth + b'"y"' + b"]" * depth + b"}"
        try:
            report = parse_report_json(data, "a")
        except ValueError as error:
            assert str(error) == "it is nested too deeply to be a report"
        else:
            assert (report.left_out["metadata"], accounted(report)) == (1, len(data))


JSON_LIKE = st.lists(
    st.sampled_from(
        [
            *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"1e999", b"-0", b"NaN", b"\\u0000", b"\\ud800"),
            *(b'"sections"', b'"metadata"', b'"final_result"', b'"final_text"', b'"chapter"', b'"section"'),
            *(b'{"sections":{"A":', b'{"improved":"x"}', b"}}", b'"text"', b"\xff", b"\xef\xbb\xbf"),
        ]
    )
).map(b"".join)
CUT = st.builds(lambda end, byte: as_bytes(reviewed())[:end] + byte, st.integers(0, 500), st.binary(max_size=2))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(), JSON_LIKE, CUT))
def test_any_bytes_are_either_refused_with_a_reason_or_accounted_for(data: bytes) -> None:
    try:
        report = parse_report_json(data, "chapter_1")
    except ValueError as error:
        assert str(error)
    else:
        assert accounted(report) == len(data)


def test_load_json_files_renders_the_improved_texts_of_each_file(tmp_path: Path) -> None:
    whole = {"sections": {"INTRODUCTION": {"original": "o", "improved": "é"}, "RESULTS": {"improved": "two\n"}}}
    (tmp_path / "part").mkdir()
    (tmp_path / "b.json").write_bytes(as_bytes(whole))
    (tmp_path / "part" / "c.JSON").write_bytes(b"\xef\xbb\xbf" + as_bytes(reviewed()))
    (tmp_path / "a_draft.json").write_bytes(as_bytes({"sections": {"A": "draft"}}))
    (tmp_path / ".hidden.json").write_bytes(b"")
    assert load_json_files(str(tmp_path)) == [
        "### INTRODUCTION:\né\n\n### RESULTS:\ntwo\n\n\n",
        "### CURRENT RESEARCH:\nnewer\n\n",
    ]


def test_load_json_files_names_every_file_that_is_not_a_report(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[]")
    (tmp_path / "b.json").write_bytes(as_bytes({"sections": {}}))
    (tmp_path / "c.json").write_bytes(b'{"sections": {"A": null}}')
    with pytest.raises(CorpusError) as error:
        load_json_files(tmp_path)
    assert str(error.value) == (
        f"Cannot read {tmp_path}/a.json: it holds a JSON list where an object is due; "
        f"{tmp_path}/c.json: sections.A is null where text is due"
    )


def test_load_json_files_names_a_missing_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"The folder {tmp_path}/gone does not exist. Create it and put json"):
        load_json_files(tmp_path / "gone")
    with pytest.raises(CorpusError, match=f"The folder {tmp_path} contains no .json file."):
        load_json_files(tmp_path)
