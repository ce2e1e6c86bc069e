"""A workspace is filled with the example report once, and nothing is ever overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_dagster.corpus import example
from ft_dagster.corpus.example import EXAMPLE, fill_with_example
from ft_dagster.corpus.files import CorpusError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shipped() -> dict[str, bytes]:
    return {name: content for name, content in contents(EXAMPLE).items() if name != "README.md"}


@pytest.mark.parametrize("before", [None, ".env", "chapter_markdowns/"])
def test_a_workspace_without_reports_is_filled_with_every_file_of_the_example(
    tmp_path: Path, before: str | None
) -> None:
    workspace = tmp_path / "new" / "demo"
    if before:
        (workspace / before).parent.mkdir(parents=True)
        (workspace / before).mkdir() if before.endswith("/") else (workspace / before).write_bytes(b"FT_THREADS=1\n")
    others = contents(workspace)
    assert fill_with_example(workspace) == len(shipped()) == 15
    assert contents(workspace) == shipped() | others


def test_files_that_a_user_edited_added_or_removed_are_left_alone(tmp_path: Path) -> None:
    fill_with_example(tmp_path)
    chapters = tmp_path / "chapter_markdowns"
    (chapters / "chapter_1.md").write_text("# Mine\n")
    (chapters / "chapter_2.md").unlink()
    (chapters / "added.md").write_text("# Added\n")
    shutil.rmtree(tmp_path / "outputs")
    before = contents(tmp_path)
    assert fill_with_example(tmp_path) == 0
    assert contents(tmp_path) == before


def test_a_used_workspace_without_chapters_is_not_filled_with_the_example_again(tmp_path: Path) -> None:
    fill_with_example(tmp_path)
    shutil.rmtree(tmp_path / "chapter_markdowns")
    (tmp_path / ".ft" / "store").mkdir(parents=True)
    assert fill_with_example(tmp_path) == 0
    assert not (tmp_path / "chapter_markdowns").exists()


@pytest.mark.parametrize(
    ("present", "named"),
    [
        ("chapter_markdowns/chapter_1.md", "chapter_markdowns"),
        ("outputs/consolidated/chapter_11.json", "outputs/consolidated"),
        (".ft/store/format.json", ".ft"),
        (".dagster/dagster.yaml", ".dagster"),
    ],
)
def test_a_workspace_with_other_reports_is_named_and_left_alone(tmp_path: Path, present: str, named: str) -> None:
    (tmp_path / present).parent.mkdir(parents=True)
    (tmp_path / present).write_text("mine\n")
    with pytest.raises(CorpusError, match=rf"{tmp_path} is not filled .* {tmp_path}/{named} already exists .*FOLDER"):
        fill_with_example(tmp_path)
    assert contents(tmp_path) == {present: b"mine\n"}


@pytest.mark.parametrize("calls", range(17))
def test_filling_interrupted_at_any_file_is_completed_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left = [calls]

    def until_cut_off(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(example.shutil, "copyfile", until_cut_off(shutil.copyfile))
        patch.setattr(Path, "rename", until_cut_off(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            fill_with_example(tmp_path)
    fill_with_example(tmp_path)
    assert contents(tmp_path) == shipped()
