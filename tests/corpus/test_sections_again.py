"""Sections after an edit: only what changed is read and written again, and what is missing is made again."""

import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus import index as index_room
from ft_dagster.corpus import sections as sections_room
from ft_dagster.corpus import snapshot as snapshot_room
from ft_dagster.corpus.chapter import Chapter, read_chapter
from ft_dagster.corpus.index import Scan, scan_reports
from ft_dagster.corpus.sections import (
    SectionShard,
    all_chapters,
    make_sections,
    stored_chapters,
    stored_shards,
)
from ft_dagster.corpus.shards import group_names
from ft_dagster.corpus.snapshot import snapshot_shards, take_snapshot
from ft_dagster.store.local import Artifact, Store, StoreError

LIMIT = 3
NAMES = [f"c{number}" for number in range(1, 13)]


pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


class Reports:
    """Reports in a workspace and the store they are made in; groups have at most three chapters."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder
        self.store = Store(folder / "store")
        self.read: list[str] = []
        """Chapters that were parsed since this list was cleared."""

    def write(self, name: str, text: str) -> None:
        path = self.workspace / "chapter_markdowns" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def delete(self, name: str) -> None:
        (self.workspace / "chapter_markdowns" / f"{name}.md").unlink()

    def snapshot(self) -> Artifact:
        return take_snapshot(self.workspace, self.workspace / "files.db", self.store)

    def make(self, **options: Any) -> Artifact:
        self.read.clear()
        return make_sections(self.snapshot(), Corpus(**options))

    def shards(self, sections: Artifact) -> dict[str, SectionShard]:
        """Return the group that each chapter is in."""
        return {
            chapter.name: shard for shard in stored_shards(sections) for chapter in stored_chapters(self.store, shard)
        }

    def flip_bit(self, blob: str) -> None:
        path = self.store.blob_path(blob)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Return reports of twelve chapters in several groups."""
    made = Reports(tmp_path)
    monkeypatch.setattr(snapshot_room, "group_names", partial(group_names, limit=LIMIT))

    def counted(name: str, *rest: Any) -> Chapter:
        made.read.append(name)
        return read_chapter(name, *rest)

    monkeypatch.setattr(sections_room, "read_chapter", counted)
    for name in NAMES:
        made.write(name, f"## Title\n\nText of {name}.\n")
    return made


def texts(sections: Artifact) -> dict[str, list[str]]:
    return {chapter.name: [s.text for s in chapter.sections] for chapter in all_chapters(sections)}


def blobs(shards: Iterable[SectionShard]) -> set[tuple[str, str]]:
    return {(shard.lines, shard.figures) for shard in shards}


def number_of_groups(names: Iterable[str]) -> int:
    return len(group_names(names, LIMIT))


def more_names() -> Iterator[str]:
    return (f"c{number}" for number in range(100, 200))


def test_at_first_every_chapter_is_read_once_and_groups_are_small(reports: Reports) -> None:
    made = reports.make()
    assert sorted(reports.read) == sorted(NAMES)
    sizes = [len(list(stored_chapters(reports.store, shard))) for shard in stored_shards(made)]
    assert sum(sizes) == len(NAMES) and max(sizes) <= LIMIT and len(sizes) > 2


def test_existing_sections_are_not_made_again(reports: Reports) -> None:
    made = reports.make()
    assert reports.make() == made
    assert reports.read == []


def test_after_an_edit_only_that_chapter_is_read_and_only_its_group_is_written(reports: Reports) -> None:
    before = reports.shards(reports.make())
    reports.write("c7", "## Title\n\nOther text.\n")
    made = reports.make()
    after = reports.shards(made)
    assert reports.read == ["c7"]
    assert texts(made)["c7"] == ["Other text."]
    written = blobs(after.values()) - blobs(before.values())
    assert written == blobs([after["c7"]])
    assert {name: after[name] for name in NAMES if before[name] != before["c7"]} == {
        name: before[name] for name in NAMES if before[name] != before["c7"]
    }


def test_a_chapter_that_splits_its_group_is_the_only_one_that_is_read(reports: Reports) -> None:
    name = next(name for name in more_names() if number_of_groups([*NAMES, name]) > number_of_groups(NAMES))
    before = reports.shards(reports.make())
    reports.write(name, f"Text of {name}.")
    after = reports.shards(reports.make())
    assert reports.read == [name]
    assert len(set(after.values()) - set(before.values())) == 2
    assert len(set(before.values()) - set(after.values())) == 1


def test_deleting_a_chapter_that_joins_two_groups_causes_no_reading(reports: Reports) -> None:
    more = next(name for name in more_names() if number_of_groups([*NAMES, name]) > number_of_groups(NAMES))
    reports.write(more, f"Text of {more}.")
    names = {*NAMES, more}
    name = next(name for name in NAMES if number_of_groups(names - {name}) < number_of_groups(names))
    before = reports.shards(reports.make())
    reports.delete(name)
    made = reports.make()
    after = reports.shards(made)
    assert reports.read == []
    assert texts(made) == {other: [f"Text of {other}."] for other in names - {name}}
    assert len(set(after.values()) - set(before.values())) == 1
    assert len(set(before.values()) - set(after.values())) == 2


def test_another_recipe_reads_all_chapters_again_and_returning_to_the_first_none(reports: Reports) -> None:
    first = reports.make()
    other = reports.make(bibliographies=True)
    assert sorted(reports.read) == sorted(NAMES)
    assert other.key != first.key
    reports.write("c1", "Other text.")
    reports.make()
    assert reports.read == ["c1"]


def test_a_text_in_two_groups_stays_in_the_chapter_that_comes_first_in_natural_order(reports: Reports) -> None:
    reports.write("c2", "## Title\n\nShared.")
    for name in ("c10", "c3", "c2 b"):
        reports.write(name, f"## Other\n\nShared.\n\n## Own\n\nOwn text of {name}.")
    made = reports.make()
    shards = reports.shards(made)
    assert len({shards[name].lines for name in ("c2", "c10", "c3")}) > 1
    assert {name: found for name, found in texts(made).items() if "Shared." in found} == {"c2": ["Shared."]}
    assert made.about["removed"] == {"exact duplicate": 3}
    size = len("OtherShared.")
    ledgers = {chapter.name: chapter.files[0].left_out["exact duplicate"] for chapter in all_chapters(made)}
    assert {name: left_out for name, left_out in ledgers.items() if left_out} == dict.fromkeys(
        ("c10", "c3", "c2 b"), size
    )
    assert made.about["left_out"]["exact duplicate"] == 3 * size


def test_a_text_reappears_in_another_chapter_when_the_first_with_it_is_deleted(reports: Reports) -> None:
    for name in ("c2", "c3", "c10"):
        reports.write(name, f"Shared.\n\n## Own\n\nOwn text of {name}.")
    before = reports.shards(reports.make())
    assert len({before[name].lines for name in ("c2", "c3", "c10")}) == 3
    reports.write("c2", "## Own\n\nOwn text of c2.")
    made = reports.make()
    assert reports.read == ["c2"]
    assert [name for name, found in texts(made).items() if "Shared." in found] == ["c3"]
    reports.delete("c3")
    made = reports.make()
    assert reports.read == []
    assert [name for name, found in texts(made).items() if "Shared." in found] == ["c10"]
    assert "exact duplicate" not in made.about["removed"]
    assert reports.shards(made)["c10"].lines == before["c10"].lines  # the blob does not record which text is used
    assert reports.shards(made)["c10"].duplicates != before["c10"].duplicates


def test_a_copy_of_a_text_in_an_earlier_chapter_removes_the_later_copy(reports: Reports) -> None:
    reports.write("c9", "Shared.\n\n## Own\n\nOwn text of c9.")
    first = reports.make()
    assert texts(first)["c9"] == ["Shared.", "Own text of c9."]
    reports.write("c1", "Shared.")
    made = reports.make()
    assert (texts(made)["c1"], texts(made)["c9"]) == (["Shared."], ["Own text of c9."])
    reports.write("c1", "Text of c1.")
    assert texts(reports.make()) == texts(first) | {"c1": ["Text of c1."]}


@pytest.mark.parametrize("kind", ["lines", "figures"])
def test_a_group_whose_blob_is_missing_is_made_again_at_the_next_change(reports: Reports, kind: str) -> None:
    shards = reports.shards(reports.make())
    lost = getattr(shards["c5"], kind)
    outside = next(name for name in NAMES if shards[name] != shards["c5"])
    reports.store.blob_path(lost).unlink()
    reports.write(outside, "Other text.")
    made = reports.make()
    assert reports.store.has_blob(lost)
    assert texts(made)["c5"] == ["Text of c5."]


@pytest.mark.parametrize("kind", ["lines", "figures"])
def test_missing_blobs_are_made_again_when_the_artifact_folders_are_deleted(reports: Reports, kind: str) -> None:
    made = reports.make()
    content = texts(made)
    reports.store.blob_path(getattr(reports.shards(made)["c5"], kind)).unlink()
    for folder in ("raw_chapters", "sections"):
        shutil.rmtree(reports.store.root / folder)
    again = reports.make()
    assert (again.about, texts(again)) == (made.about, content)


def test_missing_bytes_of_a_file_are_stored_again_by_the_next_scan(reports: Reports) -> None:
    snapshot = reports.snapshot()
    kept = reports.store.blobs()
    for file in snapshot_room.snapshot_files(snapshot):
        reports.store.blob_path(file.sha256).unlink()
    assert reports.snapshot() == snapshot
    assert reports.store.blobs() == kept


def test_an_index_with_a_wrong_hash_for_a_file_is_corrected(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_room, "_RACY_NS", -(10**18))  # as if all files had been written long ago
    snapshot = reports.snapshot()
    with closing(sqlite3.connect(reports.workspace / "files.db")) as index:
        index.execute("UPDATE files SET sha256 = '0' || substr(sha256, 2) || 'f' WHERE name = 'c5'")
        index.commit()
    looks = 0

    def look(*arguments: Any, **options: Any) -> Scan:
        nonlocal looks
        looks += 1
        assert looks < 10, "it looks again and again"
        return scan_reports(*arguments, **options)

    monkeypatch.setattr(snapshot_room, "scan_reports", look)
    assert reports.snapshot() == snapshot


def test_damaged_lines_are_named_when_they_are_read_and_are_never_used(reports: Reports) -> None:
    made = reports.make()
    damaged = reports.shards(made)["c5"].lines
    reports.flip_bit(damaged)
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        list(all_chapters(made))
    reports.write("c5", "Other text.")
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        reports.make()  # the other chapters of the group would be reused from it


def test_damaged_figures_are_named_when_they_are_read_and_are_never_used(reports: Reports) -> None:
    made = reports.make()
    shards = reports.shards(made)
    damaged = shards["c5"].figures
    reports.flip_bit(damaged)
    outside = next(name for name in NAMES if shards[name] != shards["c5"])
    reports.write(outside, "Other text.")
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        reports.make()  # the group is reused, and its figures are added up
    reports.write("c5", "Other text, too.")
    assert texts(reports.make())["c5"] == ["Other text, too."]  # the group is written again, so they are not needed


def test_damaged_bytes_of_a_report_are_named_and_not_read_as_text(reports: Reports) -> None:
    reports.write("c5", "Other text.")
    snapshot = reports.snapshot()
    damaged = next(f.sha256 for f in snapshot_room.snapshot_files(snapshot) if f.name == "c5")
    reports.flip_bit(damaged)
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        make_sections(snapshot, Corpus())


def test_a_damaged_list_of_a_snapshot_s_files_is_named(reports: Reports) -> None:
    snapshot = reports.snapshot()
    damaged = snapshot_shards(snapshot)[0].blob
    reports.flip_bit(damaged)
    with pytest.raises(StoreError, match=f"{damaged} is damaged"):
        make_sections(snapshot, Corpus())


def test_a_blank_chapter_changes_nothing_unless_it_splits_a_group(reports: Reports) -> None:
    before = reports.make()
    groups = {shard.group for shard in with_text(before)}
    divided = set()
    for name in islice(more_names(), 20):
        reports.write(name, "\n")
        after = reports.make()
        same = {shard.group for shard in with_text(after)} == groups
        assert (after.about["version"] == before.about["version"]) == same
        divided.add(not same)
        reports.delete(name)
    assert divided == {True, False}


def with_text(sections: Artifact) -> list[SectionShard]:
    """Return the groups that have text."""
    store = sections.store
    return [shard for shard in stored_shards(sections) if any(c.sections for c in stored_chapters(store, shard))]


def test_another_version_of_the_code_that_reads_chapter_names_changes_the_key(
    reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reports.snapshot()
    monkeypatch.setattr(snapshot_room, "CODE_VERSION", "another")
    after = reports.snapshot()
    assert after.key != before.key and after.about["version"] == before.about["version"]
