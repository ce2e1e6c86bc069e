"""Tests of `ft-dagster` as users type it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import COMMAND, as_process, ft_dagster, on_one_line

from ft_dagster.config.recipe_file import load_recipe, resolve_recipe
from ft_dagster.store.local import Store
from ft_dagster.training.request import PROGRESS


def test_without_chapters_the_error_says_what_to_put_where_and_names_the_demo(workspace: Path) -> None:
    done = ft_dagster("run")
    assert done.returncode == 1
    said = on_one_line(done.stderr)
    assert f"{workspace}/chapter_markdowns" in said and "outputs/consolidated" in said and "`ft-dagster demo`" in said
    assert not (workspace / ".ft").exists() and not (workspace / ".dagster").exists()


def test_without_ft_workspace_the_current_folder_is_the_workspace(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FT_WORKSPACE")
    done = ft_dagster("run", folder=tmp_path)
    assert done.returncode == 1 and f"No chapters in the workspace {tmp_path}." in on_one_line(done.stderr)


def test_an_invalid_recipe_is_refused_before_anything_is_made(workspace: Path, chapters: list[Path]) -> None:
    (workspace / "recipe.yaml").write_text("name: x\nbase: {source: embedded, model: x}\ntraining: {learning_rat: 1}\n")
    done = ft_dagster("run")
    assert done.returncode == 1
    assert "training.learning_rat is not a field of a recipe (did you mean learning_rate?)" in on_one_line(done.stderr)


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["yaml", "json"])
def test_the_recipe_in_force_is_shown_with_every_default_and_is_a_recipe_itself(
    workspace: Path, options: tuple[str, ...]
) -> None:
    shown = yaml.safe_load(ft_dagster("recipe", *options).stdout)
    recipe = load_recipe("recipe.yaml", workspace)
    assert shown == recipe.model_dump(mode="json") == resolve_recipe(shown).model_dump(mode="json")
    (workspace / "recipe.yaml").unlink()
    done = ft_dagster("recipe", *options)
    assert done.returncode == 1 and "There is no recipe 'recipe.yaml'" in on_one_line(done.stderr)


def test_a_file_that_cannot_be_read_is_named_and_the_run_fails(workspace: Path, chapters: list[Path]) -> None:
    (workspace / "outputs" / "consolidated").mkdir(parents=True)
    (workspace / "outputs" / "consolidated" / "cut.json").write_text('{"sections": {')
    done = ft_dagster("run")
    assert done.returncode == 1
    assert "outputs/consolidated/cut.json: it is not JSON" in on_one_line(done.stderr)
    assert "sections: every_file_is_readable failed" in on_one_line(done.stderr)


def test_a_run_prints_a_summary_and_the_next_one_has_nothing_to_do(workspace: Path, chapters: list[Path]) -> None:
    with chapters[0].open("a") as chapter:
        chapter.write("\nWrite to ann@reports.org.\n")
    done = ft_dagster("run", "--json")
    assert done.returncode == 0, done.stderr
    assert "sections: no_keys_or_personal_data warns." in on_one_line(done.stderr)
    assert f"chapter_markdowns/{chapters[0].name}, BACKGROUND KNOWLEDGE, line 3: E-mail address" in done.stderr
    assert "ann@" not in done.stderr + done.stdout
    summary = json.loads(done.stdout)
    assert summary["chapters"] == 6 and summary["used_bytes"] == summary["usable_bytes"]
    assert summary["bits_per_byte"]["new"] < summary["bits_per_byte"]["base"]
    assert summary["adapter"] == str(workspace / "fine_tuned_model")
    said = on_one_line(done.stderr)
    assert "lora_adapter never materialized (missing) runs" in said and "100.0%" in said
    again = ft_dagster("run", "--json")
    assert again.returncode == 0 and "Nothing to do" in again.stderr
    assert json.loads(again.stdout) == summary


def test_an_interrupted_run_leaves_nothing_behind_and_the_next_one_resumes(
    workspace: Path, chapters: list[Path]
) -> None:
    recipe = workspace / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 3", "epochs: 8"))
    process = subprocess.Popen([*COMMAND, "run"], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(workspace.glob(".ft/attempts/*/*/checkpoint-*/complete")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 130, said
    assert "continues from its last checkpoint" in on_one_line(said)
    assert not [line for line in running_commands() if str(workspace) in line]
    done = ft_dagster("run", "--json")
    assert done.returncode == 0, done.stderr
    (adapter,) = (workspace / ".ft" / "store" / "lora_adapter").iterdir()
    assert json.loads((adapter / "artifact.json").read_text())["about"]["resumed_from"] > 0
    assert not list(workspace.rglob(PROGRESS))


def running_commands() -> list[str]:
    paths = Path("/proc").glob("[0-9]*/cmdline")
    return [_read(path).replace("\0", " ") for path in paths]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_help_and_version_are_printed() -> None:
    assert "Bring everything up to date" in on_one_line(as_process("--help").stdout)
    assert "Exit codes" in on_one_line(ft_dagster("run", "--help").stdout)
    assert as_process("--version").stdout.startswith("ft_dagster 0.")
    assert shutil.which("ft-dagster", path=str(Path(sys.executable).parent)) is not None
    assert os.path.sep in COMMAND[0]


def test_a_plan_shows_what_a_run_will_do_and_its_exit_code_whether_it_has_work(
    workspace: Path, chapters: list[Path]
) -> None:
    before = sorted(workspace.rglob("*"))
    first = ft_dagster("plan")
    assert first.returncode == 2 and "6 chapter(s) added" in first.stdout, first.stderr
    assert "never materialized (missing)" in first.stdout and "optimizer steps" in first.stdout
    assert sorted(workspace.rglob("*")) == before, "not even a folder was made"
    assert ft_dagster("run").returncode == 0
    done = ft_dagster("plan", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["nothing_to_do"] is True
    chapters[0].unlink()
    after = json.loads(ft_dagster("plan", "--json").stdout)
    assert [change["chapter"] for change in after["removed"]] == [chapters[0].stem]
    assert after["words"]["removed"] > 50 and after["steps"] > 0


def test_a_plan_without_chapters_is_an_error(workspace: Path) -> None:
    done = ft_dagster("plan")
    assert done.returncode == 1 and "No chapters in the workspace" in on_one_line(done.stderr)


def test_clean_lists_what_it_would_remove_and_removes_it_only_when_confirmed(workspace: Path) -> None:
    left = workspace / ".ft" / "store" / "staging" / "left"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x" * 1000)
    shown = ft_dagster("clean", "--json")
    assert shown.returncode == 0 and left.exists(), shown.stderr
    assert json.loads(shown.stdout)["removable"] == {"unfinished artifacts": {"count": 1, "bytes": 1000}}
    assert "unfinished artifacts" in shown.stderr and "Removed" not in shown.stderr
    removed = ft_dagster("clean", "--yes")
    assert removed.returncode == 0 and not left.exists()
    assert "Nothing to remove" in ft_dagster("clean").stderr


def test_clean_without_the_history_that_says_what_is_in_use_is_refused(workspace: Path, chapters: list[Path]) -> None:
    store = Store(workspace / ".ft" / "store")
    with store.staging() as folder:
        store.commit("raw_chapters", "key", folder, {})
    done = ft_dagster("clean", "--yes")
    assert done.returncode == 1 and "Set DAGSTER_HOME" in on_one_line(done.stderr)
    assert store.find("raw_chapters", "key") is not None
