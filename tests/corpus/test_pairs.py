"""Pairs of an original and an improved text: when there is one, what it contains, and which version it comes from."""

from collections.abc import Mapping
from typing import Any

import pytest
from sections_of import Content, draft, read, reviewed, version

from ft_dagster.corpus.pairs import Pair

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def whole_report(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a whole report (shape 2a)."""
    return {"sections": sections}


def pairs(files: Mapping[str, Content], **options: Any) -> list[tuple[str, str, bool]]:
    """Return (original, improved, whole) of each pair."""
    return [(pair.original, pair.improved, pair.whole) for pair in read(files, **options).pairs]


def test_a_reviewed_section_and_a_section_of_a_whole_report_give_pairs() -> None:
    points = [["say why", "be  brief\n"], ["say why", "", "add a number"]]
    files: dict[str, Content] = {
        "a.json": whole_report(A={"original": "öld", "improved": "new"}, B={"improved": "no original"}),
        "b.json": reviewed(1, "C", "better", original="good", points=points),
    }
    assert read(files).pairs == [
        Pair("A", "## A\n\nöld", "## A\n\nnew", (), "outputs/consolidated/a.json", (0,)),
        Pair(
            "C",
            "## C\n\ngood",
            "## C\n\nbetter",
            ("say why", "be brief", "add a number"),
            "outputs/consolidated/b.json",
            (0,),
        ),
    ]


def test_a_pair_contains_all_sections_in_order_and_both_texts_are_cleaned_alike() -> None:
    review = "### Citation Accuracy Analysis\n\n0.5\n\n---\n\n"
    original = f"{review}one  \n\n\n\n## References\n\n[1]\n\n## Sub {{#s}}\n\ntwo<!-- x -->\r\n"
    improved = f"{review}ONE\n\n## Sub\n\nTWO\n\n## References\n\n[2]"
    files: dict[str, Content] = {
        "chapter_1.md": "## Sub\n\nold two\n\n## A\n\nold one",
        "a.json": reviewed(1, "A", improved, original=original),
    }
    (pair,) = read(files).pairs
    assert pair.original == "## A\n\none\n\n## Sub\n\ntwo"
    assert pair.improved == "## A\n\nONE\n\n## Sub\n\nTWO"
    (pair,) = read(files, bibliographies=True, review_blocks=True).pairs
    assert pair.original.startswith(f"## A\n\n{review}one") and "## References\n\n[1]" in pair.original
    assert pair.improved.startswith(f"## A\n\n{review}ONE") and pair.improved.endswith("## References\n\n[2]")


@pytest.mark.parametrize("original", [None, "", "  \n", "same", "same  \n", 5, ["text"], "a\x00b", "a\ud83d"])
def test_a_section_without_a_different_original_is_used_but_gives_no_pair(original: Any) -> None:
    for content in (whole_report(A={"original": original, "improved": "same"}), reviewed(1, "A", "same", "", original)):
        made = read({"a.json": content})
        assert made.pairs == [] and [section.text for section in made.sections] == ["same"]


def test_a_text_that_was_not_rewritten_gives_no_pair() -> None:
    unchanged = reviewed(1, "A", "text", original="other")
    unchanged["final_result"]["final_status"] = "unchanged"
    skipped = reviewed(1, "B", "more text", original="other")
    skipped["metadata"]["skipped"] = True
    kept = {
        "metadata": {"chapter": 1, "section": "REFERENCES", "skipped": True},
        "original_content": "[1]",
        "final_result": {"final_text": "[1] Smith", "status": "preserved"},
    }
    files: dict[str, Content] = {"a.json": unchanged, "b.json": skipped, "c.json": kept, "d.json": draft(D="draft")}
    assert len(read(files, bibliographies=True, drafts=True).sections) == 4
    assert pairs(files, bibliographies=True, drafts=True) == []


def test_a_bibliography_is_a_pair_only_where_the_recipe_keeps_it() -> None:
    files: dict[str, Content] = {"a.json": whole_report(REFERENCES={"original": "[1]", "improved": "[1] Smith"})}
    assert pairs(files) == []
    assert pairs(files, bibliographies=True) == [("## REFERENCES\n\n[1]", "## REFERENCES\n\n[1] Smith", True)]


def test_points_that_are_not_text_are_ignored() -> None:
    points = [None, "text", [None, 5, "good", "a\x00b"], {"0": "x"}]
    (pair,) = read({"a.json": reviewed(1, "A", "new", original="old", points=points)}).pairs
    assert pair.brief == ("good",)


def test_a_pair_comes_from_the_version_that_is_used() -> None:
    older = reviewed(1, "A", "older", "2024", 0.9, original="first")
    newer = reviewed(1, "a:", "newer", "2025", 0.4, original="second")
    files: dict[str, Content] = {"chapter_1.md": "## A\n\nold", "x.json": older, "y.json": newer}
    assert pairs(files) == [("## a:\n\nsecond", "## a:\n\nnewer", True)]
    assert pairs(files, minimum_score=0.5) == []


def test_the_same_pair_in_two_chapters_is_complete_only_in_the_first() -> None:
    same = {"original": "old", "improved": "new"}
    files: dict[str, Content] = {f"{name}.json": whole_report(A=same) for name in ("c10", "c2")}
    assert pairs(files) == [("## A\n\nold", "## A\n\nnew", True), ("## A\n\nold", "## A\n\nnew", False)]
    made = read(files)
    assert [pair.source[-8:] for pair in made.pairs if pair.whole] == ["/c2.json"]
    assert made.about["pairs"] == 1


def test_a_pair_with_part_of_its_text_in_another_place_is_not_complete() -> None:
    files: dict[str, Content] = {
        "a.md": "## Summary\n\nshared",
        "b.json": whole_report(
            A={"original": "old", "improved": "new\n\n## Sub\n\nshared\n\n## End\n\nend"},
            B={"original": "second", "improved": "2nd"},
        ),
    }
    first, second = read(files).pairs
    assert (first.sections, first.whole) == ((0, 1), False)
    assert (second.sections, second.whole) == ((2,), True)


def test_editing_an_original_or_a_brief_changes_the_version_of_the_sections() -> None:
    def files(**changes: Any) -> dict[str, Content]:
        return {"a.json": reviewed(1, "A", "new", **({"original": "old", "points": [["p"]]} | changes))}

    versions = [version(files()), version(files(original="öld")), version(files(points=[["q"]]))]
    assert len(set(versions)) == 3
    assert version(files(original="old  \r\n\n", timestamp="2026", score=0.5)) == versions[0]
    assert version(files(original=None)) == version({"chapter_1.md": "## A\n\nnew"})


def test_pairs_of_several_files_come_in_the_order_of_their_sections() -> None:
    files: dict[str, Content] = {
        "chapter_1.md": "## B\n\nb\n\n## A\n\na",
        "x.json": reviewed(1, "A", "new a", original="old a"),
        "y.json": reviewed(1, "B", "new b", original="old b"),
    }
    assert [pair.title for pair in read(files).pairs] == ["B", "A"]
    renamed = {{"x.json": "z.json"}.get(name, name): content for name, content in files.items()}
    assert version(renamed) == version(files)
