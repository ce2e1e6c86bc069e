"""Tests of `ft-dagster lineage`, `generate` and `release push` as users type them, on a finished workspace."""

import json
from pathlib import Path

import pytest
from commands import as_process, ft_dagster, on_one_line
from reports import chapter_text

from ft_dagster import load_released
from ft_dagster.evaluation.samples import continue_prompt
from ft_dagster.model.manifest import AdapterError, read_manifest


@pytest.fixture(autouse=True)
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished workspace; these commands change nothing in it."""
    monkeypatch.delenv("HUGGINGFACE_TOKEN", raising=False)
    monkeypatch.setenv("FT_WORKSPACE", str(finished / "workspace"))
    monkeypatch.setenv("FT_RECIPE", "recipe.yaml")
    monkeypatch.setenv("FT_CACHE", str(finished / "cache"))
    return finished / "workspace"


def test_lineage_shows_the_chapters_of_the_released_adapter_by_default_and_by_key(here: Path) -> None:
    manifest = read_manifest(here / "fine_tuned_model")
    said = on_one_line(ft_dagster("lineage").stdout)
    assert manifest.key in said and all(chapter in said for chapter in manifest.chapters)
    shown = json.loads(ft_dagster("lineage", "show", manifest.key[:8], "--json").stdout)
    assert shown == json.loads(ft_dagster("lineage", "--json").stdout)
    assert {item["chapter"]: item["files"] for item in shown["chapters"]} == manifest.chapters
    assert [item["chapter"] for item in shown["chapters"] if item["held_out"]] == list(manifest.held_out)


def test_an_adapter_compared_with_itself_differs_in_nothing(here: Path) -> None:
    key = read_manifest(here / "fine_tuned_model").key
    found = json.loads(ft_dagster("lineage", "diff", key[:8], "--json").stdout)
    assert (found["before"], found["after"], found["added"], found["recipe"]) == (key, key, [], [])
    assert all(row["before"] == row["after"] for row in found["bits_per_byte"].values()) and found["bits_per_byte"]
    assert "same chapters" in ft_dagster("lineage", "diff", key[:8]).stdout


def test_find_lists_adapters_that_know_a_sentence_and_exits_with_1_if_none_does(here: Path) -> None:
    manifest = read_manifest(here / "fine_tuned_model")
    chapter = next(name for name in manifest.chapters if name not in manifest.held_out)
    sentence = chapter_text(int(chapter.removeprefix("chapter_"))).strip().split(". ")[-1]
    done = ft_dagster("lineage", "find", sentence, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == [{"adapter": manifest.key, "places": [[chapter, "BACKGROUND KNOWLEDGE"]]}]
    assert chapter in ft_dagster("lineage", "find", "--chapter", chapter).stdout
    assert ft_dagster("lineage", "find", "nobody wrote this").returncode == 1
    assert "Name a text, or a chapter" in ft_dagster("lineage", "find").stderr


def test_reports_are_restored_to_a_new_folder_and_to_no_other(here: Path, tmp_path: Path) -> None:
    key = read_manifest(here / "fine_tuned_model").key
    done = ft_dagster("lineage", "restore", key[:8], str(tmp_path / "again"), "--json")
    assert done.returncode == 0, done.stderr
    for file in json.loads(done.stdout)["files"]:
        assert (tmp_path / "again" / file).read_bytes() == (here / file).read_bytes()
    refused = ft_dagster("lineage", "restore", key[:8], str(tmp_path / "again"))
    assert refused.returncode == 1 and "is not empty" in refused.stderr


def test_base_and_adapter_answer_a_question_side_by_side(here: Path) -> None:
    said = as_process("generate", "--chat", "Who met?", "--tokens", "4").stdout
    assert said.startswith("base: ") and "\nadapter: " in said


def test_a_notebook_gets_model_and_tokenizer_that_write_what_the_command_writes(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompt = "The committee met on"
    done = as_process("generate", prompt, "--tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written.keys() == {"base", "adapter"}
    monkeypatch.delenv("FT_WORKSPACE")
    model, tokenizer = load_released(here)
    assert continue_prompt(model, tokenizer, prompt, 8) == written["adapter"]
    with pytest.raises(AdapterError, match="has no manifest"):
        load_released(tmp_path)


def test_a_conversation_ends_at_the_end_of_its_input() -> None:
    done = as_process("chat", "--tokens", "4", said="Who met?\n")
    assert done.returncode == 0, done.stderr
    assert "/exit or Ctrl-D quits" in on_one_line(done.stderr)


def test_publishing_without_confirmation_shows_what_it_would_upload(here: Path) -> None:
    done = ft_dagster("release", "push", "team/reports", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["commit"] is None and read_manifest(here / "fine_tuned_model").key in shown["card"]
    assert "Would go to team/reports" in on_one_line(done.stderr)


def test_publishing_needs_a_token(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "")
    env_file = here / ".env"
    if env_file.exists():  # the finished workspace has one with an invalid token
        copy = tmp_path / "workspace"
        copy.mkdir()
        for name in (".ft", "fine_tuned_model", "recipe.yaml"):
            (copy / name).symlink_to(here / name)
        monkeypatch.setenv("FT_WORKSPACE", str(copy))
    done = ft_dagster("release", "push", "team/reports", "--yes")
    assert done.returncode == 1 and "HUGGINGFACE_TOKEN is not set" in on_one_line(done.stderr)


@pytest.mark.parametrize("command", [("lineage",), ("generate", "x"), ("chat",), ("release", "export", "merged")])
def test_before_the_first_release_each_command_says_what_to_do(workspace: Path, command: tuple[str, ...]) -> None:
    done = ft_dagster(*command, folder=workspace)
    assert done.returncode == 1
    assert "Nothing is released in" in on_one_line(done.stderr)
