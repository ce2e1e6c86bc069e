"""Sections of all chapters contain one version of each, each text once, in order, and account for every byte."""

import json
from collections import Counter
from pathlib import Path

import pytest
from sections_of import Content, draft, read, removed, reviewed, source_file, texts, version

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus.chapter import Section, natural_key, read_chapter
from ft_dagster.corpus.files import SourceFile, Unreadable
from ft_dagster.corpus.index import Scan
from ft_dagster.corpus.ledger import FileLedger, LedgerError
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.snapshot import take_snapshot, write_snapshot
from ft_dagster.store.hashing import digest
from ft_dagster.store.local import Store

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def test_a_chapter_becomes_sections_in_its_order() -> None:
    made = read({"part/a b.md": "# Deltas\n\n## One\n\ntext\n\n## Two\n\nmore words\n"})
    first, second = made.sections
    assert first == Section(
        chapter="part/a b",
        title="One",
        level=2,
        lead=("# Deltas",),
        text="text",
        source="chapter_markdowns/part/a b.md",
        hash=digest([["# Deltas"], "One", 2, "text"]),
    )
    assert (second.title, second.lead, second.text) == ("Two", (), "more words")
    assert [made.about[name] for name in ("chapters", "sections", "words")] == [1, 2, 3]


def test_a_chapter_is_the_same_after_it_was_stored(tmp_path: Path) -> None:
    data = "# L\n\n## Ünï\n\nté\u2028x\x85t\n\n- a\n\n## B\n\nb".encode()
    report = json.dumps(reviewed("ä", "B", "better\n\n## New\n\nnew", original="wörse", points=[["p"]])).encode()
    files = {source_file("ä.md", data): data, source_file("x.json", report): report}
    store = Store(tmp_path)
    store.put_blobs(files.values())
    (stored,) = all_chapters(make_sections(write_snapshot(Scan(list(files)), store), Corpus()))
    assert stored == read_chapter("ä", files, files.__getitem__, Corpus())
    assert [section.title for section in stored.sections] == ["Ünï", "B", "New"]
    assert stored.removed == {"improved version in JSON": 1}
    assert [(pair.original, pair.sections) for pair in stored.pairs] == [("## B\n\nwörse", (1, 2))]


def test_chapters_come_in_natural_order_whatever_the_order_of_files() -> None:
    files: dict[str, Content] = {f"{name}.md": name for name in ("²", "1/x", "a10", "a2", "a02", "a9b", "9" * 250)}
    expected = ["1/x", "9" * 250, "a02", "a2", "a9b", "a10", "²"]
    assert [chapter for chapter, _, _ in texts(files)] == expected
    assert [chapter for chapter, _, _ in texts(dict(reversed(files.items())))] == expected


def test_a_chapter_number_of_any_length_can_be_sorted() -> None:
    assert natural_key("c" + "9" * 5000) < natural_key("c1" + "0" * 5000)


def test_a_first_draft_is_left_out_unless_the_recipe_wants_it() -> None:
    files: dict[str, Content] = {"chapter_4_draft.json": draft(A="öne", B="two", REFERENCES="[1]")}
    made = read(files)
    assert made.sections == []
    assert made.files[0].left_out["draft"] == len("Aöne".encode()) + len("BtwoREFERENCES[1]")
    assert made.about["chapters"] == 0
    assert texts(files, drafts=True) == [("chapter_4", "A", "öne"), ("chapter_4", "B", "two")]


def test_a_draft_is_replaced_by_any_other_text_of_the_same_section() -> None:
    files: dict[str, Content] = {
        "chapter_1_draft.json": draft(A="draft a", B="draft b", C="draft c"),
        "chapter_1.md": "## b\n\nmarkdown b",
        "chapter_1_c.json": reviewed(1, "C:", "json c"),
    }
    assert texts(files, drafts=True) == [
        ("chapter_1", "b", "markdown b"),
        ("chapter_1", "A", "draft a"),
        ("chapter_1", "C:", "json c"),
    ]
    assert removed(files, drafts=True) == {"draft of a section that exists": 2}


def test_a_section_in_markdown_and_json_is_used_once_with_the_text_of_the_json() -> None:
    files: dict[str, Content] = {
        "chapter_3.md": "# Chapter 3\n\n## CURRENT RESEARCH\n\nold\n\n## BACKGROUND KNOWLEDGE\n\nother\n",
        "chapter_3_current_research_consolidated.json": reviewed(3, "Current research", "new"),
    }
    made = read(files)
    assert [(s.chapter, s.title, s.text, s.source) for s in made.sections] == [
        ("chapter_3", "Current research", "new", f"outputs/consolidated/{list(files)[1]}"),
        ("chapter_3", "BACKGROUND KNOWLEDGE", "other", "chapter_markdowns/chapter_3.md"),
    ]
    assert made.about["removed"] == {"improved version in JSON": 1}
    assert made.files[0].left_out["improved version in JSON"] == len("CURRENT RESEARCHold")
    assert made.files[0].used == len("BACKGROUND KNOWLEDGEother")


def test_a_chapter_that_moves_from_markdown_to_json_keeps_its_version() -> None:
    review = "### Citation Accuracy Analysis\n\nScore: 0.5\n\n---\n\n"
    names = {"BACKGROUND KNOWLEDGE": "one\n\n## Summary\n\n1", "CURRENT RESEARCH": "two\n\n## Summary\n\n2"}
    markdown = "".join(f"## {name}\n\n{review}{text}\n\n" for name, text in names.items())
    before: dict[str, Content] = {"chapter_3.md": f"# Chapter 3\n\n{markdown}## REFERENCES\n\n[1]\n"}
    after: dict[str, Content] = {f"{i}.json": reviewed(3, *item) for i, item in enumerate(reversed(names.items()))}
    after["9.json"] = reviewed(3, "REFERENCES", "[1]")
    assert len(read(before).sections) == 4
    assert version(before) == version(after) == version(before | after)


def test_the_later_of_two_json_versions_is_used_completely() -> None:
    files: dict[str, Content] = {
        "z.json": reviewed(1, "A", "old\n\n## Detail\n\nold detail", "2025-01-31"),
        "y.json": reviewed(1, "a", "new\n\n## Other\n\nnew detail", "2025-02-01"),
    }
    assert texts(files) == [("chapter_1", "a", "new"), ("chapter_1", "Other", "new detail")]
    assert removed(files) == {"older version": 2}


def test_of_two_json_versions_with_the_same_time_the_last_name_is_used() -> None:
    files: dict[str, Content] = {"b.json": reviewed(1, "A", "b"), "a.json": reviewed(1, "A", "a")}
    assert texts(files) == texts(dict(reversed(files.items()))) == [("chapter_1", "A", "b")]


def test_two_markdown_files_of_one_chapter_are_versions_of_it() -> None:
    files: dict[str, Content] = {"a.markdown": "## A\n\none\n\n## B\n\ntwo", "a.md": "## A\n\nnew"}
    assert texts(files) == [("a", "A", "new"), ("a", "B", "two")]
    assert removed(files) == {"older version": 1}


def test_titles_may_repeat_within_a_chapter() -> None:
    markdown = "## A\n\none\n\n## Summary\n\ns1\n\n## B\n\ntwo\n\n## Summary\n\ns2\n\n## Summary\n\ns3"
    expected = [("A", "one"), ("Summary", "s1"), ("B", "two"), ("Summary", "s2"), ("Summary", "s3")]
    assert [found[1:] for found in texts({"chapter_1.md": markdown})] == expected
    expected[2:4] = [("B", "two!"), ("Summary", "s2!")]
    newer = reviewed(1, "B", "two!\n\n## Summary\n\ns2!")
    assert [found[1:] for found in texts({"chapter_1.md": markdown, "b.json": newer})] == expected


def test_sections_of_several_json_files_may_have_headings_of_one_name() -> None:
    files: dict[str, Content] = {
        "a.json": reviewed(1, "RESULTS", "## Summary\n\none"),
        "b.json": reviewed(1, "DISCUSSION", "two\n\n## Summary\n\nthree", "2026"),
    }
    made = read(files)
    assert [(s.lead, s.title, s.text) for s in made.sections] == [
        (("## RESULTS",), "Summary", "one"),
        ((), "DISCUSSION", "two"),
        ((), "Summary", "three"),
    ]
    markdown = "## RESULTS\n\n## Summary\n\none\n\n## DISCUSSION\n\ntwo\n\n## Summary\n\nthree"
    assert texts(files | {"chapter_1.md": markdown}) == [(s.chapter, s.title, s.text) for s in made.sections]
    assert made.about["removed"] == {}


def test_sections_named_by_year_are_not_versions_of_each_other() -> None:
    files: dict[str, Content] = {
        "chapter_1.md": "## 2019 results\n\none\n\n## 2020 results\n\ntwo",
        "a.json": reviewed(1, "2020 results", "new"),
    }
    assert texts(files) == [("chapter_1", "2019 results", "one"), ("chapter_1", "2020 results", "new")]


def test_the_same_text_in_two_places_is_used_at_the_first() -> None:
    files: dict[str, Content] = {"b.md": "## X\n\nsame", "a.md": "## Y\n\nsame\n\n## Z\n\n  same\n\n## W\n\nsame"}
    made = read(files)
    assert [(s.chapter, s.title, s.text) for s in made.sections] == [("a", "Y", "same"), ("a", "Z", "  same")]
    assert made.about["removed"] == {"exact duplicate": 2}
    assert {ledger.path[-4:]: ledger.left_out["exact duplicate"] for ledger in made.files} == {"b.md": 5, "a.md": 5}
    assert made.about["chapters"] == 1


def test_a_section_scored_below_the_minimum_is_left_out_with_its_markdown_copy() -> None:
    files: dict[str, Content] = {
        "chapter_1.md": "## A\n\npoor\n\n## B\n\ngood\n\n## C\n\nunscored",
        "a.json": reviewed(1, "A", "poor", score=0.49),
        "b.json": reviewed(1, "B", "good", score=0.5),
        "c.json": reviewed(1, "C", "unscored"),
        "d.json": draft(A="was poor"),
    }
    kept = [("chapter_1", "B", "good"), ("chapter_1", "C", "unscored")]
    assert texts(files, minimum_score=0.5) == kept
    assert removed(files, minimum_score=0.5) == {
        "improved version in JSON": 3,
        "score below the recipe's minimum": 1,
    }
    assert texts(files) == [("chapter_1", "A", "poor"), *kept]


def test_bibliographies_and_review_blocks_follow_the_recipe_in_markdown_and_json() -> None:
    review = "### Citation Accuracy Analysis\n\n0.5\n\n---\n\n"
    files: dict[str, Content] = {
        "a.md": f"## A\n\n{review}one\n\n## References\n\n[1]",
        "b.json": {"sections": {"B": {"improved": f"{review}two"}, "REFERENCES": {"improved": "[2]"}}},
    }
    assert texts(files) == [("a", "A", "one"), ("b", "B", "two")]
    assert texts(files, bibliographies=True, review_blocks=True) == [
        ("a", "A", f"{review}one"),
        ("a", "References", "[1]"),
        ("b", "B", f"{review}two"),
        ("b", "REFERENCES", "[2]"),
    ]


def test_a_file_that_cannot_be_read_is_listed_and_all_its_bytes_are_accounted_for() -> None:
    link = Unreadable("chapter_markdowns/link.md", "leads out")
    files: dict[str, Content] = {"good.md": "text", "latin.md": b"caf\xe9", "cut.json": b'{"sections": {"A":'}
    made = read(files, link)
    assert [section.text for section in made.sections] == ["text"]
    assert [(item["path"], item["reason"]) for item in made.unreadable] == [
        ("chapter_markdowns/link.md", "leads out"),
        ("outputs/consolidated/cut.json", "it is not JSON: Expecting value: line 1 column 19"),
        (
            "chapter_markdowns/latin.md",
            "byte 3 (0xe9) is not UTF-8; save it again as UTF-8 (Latin-1 and Windows-1252 files are common causes)",
        ),
    ]
    assert made.about["bytes_in"] == 4 + 4 + 18
    assert made.about["used"] == 4
    assert made.about["left_out"] == {"unreadable file": 22}


def test_a_report_with_keys_that_cannot_be_encoded_is_refused_and_others_are_read() -> None:
    made = read({"a.json": rb'{"\ud800": 1}', "good.md": "text"})
    assert [section.text for section in made.sections] == ["text"]
    assert [(item["path"], item["reason"][-15:]) for item in made.unreadable] == [
        ("outputs/consolidated/a.json", r"(found: \ud800)")
    ]


def test_reports_that_can_all_be_read_pass_and_an_empty_file_is_one_of_them() -> None:
    made = read({"empty.md": "", "blank.md": "\r\n"})
    assert made.sections == [] and made.unreadable == []
    assert [ledger.row() for ledger in made.files] == [
        {"path": "chapter_markdowns/blank.md", "size": 2, "used": 0, "left_out": {"line ends": 1, "white space": 1}},
        {"path": "chapter_markdowns/empty.md", "size": 0, "used": 0, "left_out": {}},
    ]


def test_sections_metadata_is_plain_json_with_files_in_natural_order_of_chapters() -> None:
    made = read({"c10.md": "## A\n\ntext", "c9.md": "text", "bad.md": b"\xff\xfe"}, Unreadable("x.md", "a pipe", 3))
    problem = "it is UTF-16, not UTF-8; save it again as UTF-8"
    about = {name: value for name, value in made.about.items() if name not in ("made_by", "raw_chapters", "version")}
    assert (
        about
        == json.loads(json.dumps(about))
        == {
            "chapters": 1,
            "sections": 1,
            "words": 1,
            "pairs": 0,
            "bytes_in": 19,
            "used": 4,
            "left_out": {"unreadable file": 5, "exact duplicate": 5, "heading marks": 4, "white space": 1},
            "removed": {"exact duplicate": 1},
        }
    )
    assert made.unreadable == [
        {"path": "x.md", "reason": "a pipe", "size": 3},
        {"path": "chapter_markdowns/bad.md", "reason": problem, "size": 2},
    ]
    assert [ledger.row() for ledger in made.files] == [
        {
            "path": "chapter_markdowns/bad.md",
            "size": 2,
            "used": 0,
            "left_out": {"unreadable file": 2},
            "problem": problem,
        },
        {"path": "chapter_markdowns/c9.md", "size": 4, "used": 4, "left_out": {}},
        {
            "path": "chapter_markdowns/c10.md",
            "size": 10,
            "used": 0,
            "left_out": {"exact duplicate": 5, "heading marks": 4, "white space": 1},
        },
    ]


def test_reports_without_a_file_have_no_sections() -> None:
    made = read({})
    assert (made.sections, made.files, made.unreadable, made.about["bytes_in"]) == ([], [], [], 0)


@pytest.mark.parametrize(
    "ledger",
    [
        FileLedger("a.md", 3, used=2),
        FileLedger("a.md", 3, used=4),
        FileLedger("a.md", 3, used=-1, left_out=Counter(x=4)),
        FileLedger("a.md", 3, used=4, left_out=Counter(x=-1)),
    ],
)
def test_an_unbalanced_byte_account_raises_an_internal_error(ledger: FileLedger) -> None:
    with pytest.raises(LedgerError, match=r"^a\.md: 3 bytes, but \d are accounted for"):
        ledger.check()


def test_reading_stops_when_the_bytes_of_a_file_are_not_all_accounted_for() -> None:
    file = SourceFile("chapter_markdowns/a.md", "a", "markdown", 5, "", "a", 1)
    with pytest.raises(LedgerError, match=r"^chapter_markdowns/a\.md: 5 bytes, but 4 are accounted for"):
        read_chapter("a", [file], lambda _: b"text", Corpus())


def test_sections_of_a_renamed_workspace_have_the_same_version(tmp_path: Path) -> None:
    def version_in(workspace: Path) -> str:
        snapshot = take_snapshot(workspace, workspace / "files.db", Store(workspace / "store"))
        return str(make_sections(snapshot, Corpus()).about["version"])

    folder = tmp_path / "one" / "chapter_markdowns"
    folder.mkdir(parents=True)
    (folder / "a.md").write_text("## A\n\ntext")
    (folder / "b.md").write_text("## B\n\nmore")
    before = version_in(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "zwei – drei")
    assert version_in(tmp_path / "zwei – drei") == before
    (tmp_path / "zwei – drei" / "chapter_markdowns" / "b.md").rename(tmp_path / "zwei – drei/chapter_markdowns/c.md")
    assert version_in(tmp_path / "zwei – drei") != before  # a chapter's name is its identity
