"""Tests of `ft-dagster release` as users type it, on a workspace with a released adapter."""

import getpass
import json
from pathlib import Path

import dagster as dg
import pytest
from commands import ft_dagster, on_one_line
from graphs import run

from ft_dagster.defs.stages import RELEASED_ADAPTER, STAGES


def in_use(workspace: Path) -> str:
    return (workspace / "fine_tuned_model").resolve().name


def test_promoting_and_rolling_back_switch_at_once_and_the_history_says_who_and_why(two_adapters: Path) -> None:
    first = in_use(two_adapters)
    done = ft_dagster("release", "promote", "sec", "--why", "the gate is too strict", "--json")
    assert done.returncode == 0, done.stderr
    assert in_use(two_adapters) == "second"
    entry = json.loads(done.stdout)
    assert entry["why"] == {
        "decision": "promoted by hand",
        "reason": "the gate is too strict",
        "by": getpass.getuser(),
    }
    done = ft_dagster("release", "rollback", "--why", "it was not")
    assert done.returncode == 0, done.stderr
    assert in_use(two_adapters) == first
    rows = json.loads(ft_dagster("release", "list", "--json").stdout)
    assert [(row["adapter"], row["decision"], row["in_use"]) for row in rows] == [
        (first, "release", False),
        ("second", "promoted by hand", False),
        (first, "rolled back", True),
    ]
    assert rows[0]["bits_per_byte"] < 10
    said = on_one_line(ft_dagster("release", "list").stdout)
    assert "in use" in said and "the gate is too strict" in said


def test_a_folder_that_a_user_put_in_the_place_of_the_release_is_kept_and_named(two_adapters: Path) -> None:
    link = two_adapters / "fine_tuned_model"
    link.unlink()
    link.mkdir()
    (link / "mine.txt").write_text("not yours")
    done = ft_dagster("release", "promote", "second", "--why", "a try")
    assert done.returncode == 0, done.stderr
    (kept,) = two_adapters.glob("fine_tuned_model.before-*")
    assert (kept / "mine.txt").read_text() == "not yours" and str(kept) in on_one_line(done.stderr)


def test_dagster_records_a_release_by_hand_and_starts_no_run_because_of_it(two_adapters: Path) -> None:
    assert ft_dagster("plan").returncode == 0
    assert ft_dagster("release", "promote", "second", "--why", "a try").returncode == 0
    with dg.DagsterInstance.get() as instance:  # in DAGSTER_HOME
        (seen,) = instance.fetch_observations(RELEASED_ADAPTER.key, limit=5).records
        assert seen.asset_observation and seen.asset_observation.metadata["reason"].value == "a try"
    done = ft_dagster("run")
    assert done.returncode == 0 and "Nothing to do" in done.stderr
    assert in_use(two_adapters) == "second"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rollback", "--why", "x"), "No other adapter was in use before this one."),
        (("rollback", "second", "--why", "x"), "0 of the adapters that were in use have a key that begins with"),
        (("promote", "nothing", "--why", "x"), "There is not exactly one lora_adapter whose key begins with 'nothing'"),
        (("promote", "second", "--why", " "), "Say why"),
    ],
)
def test_an_impossible_command_is_refused_and_changes_nothing(
    two_adapters: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = in_use(two_adapters)
    done = ft_dagster("release", *arguments)
    assert done.returncode == 1
    assert message in on_one_line(done.stderr)
    assert in_use(two_adapters) == before


def test_a_workspace_without_a_release_says_so(workspace: Path) -> None:
    assert on_one_line(ft_dagster("release", "list").stdout) == "Nothing was released yet."
    assert json.loads(ft_dagster("release", "list", "--json").stdout) == []


def test_materializing_all_does_not_release_an_adapter_that_was_rolled_back(two_adapters: Path) -> None:
    first = in_use(two_adapters)
    assert ft_dagster("release", "promote", "second", "--why", "the first one invents names").returncode == 0
    with dg.DagsterInstance.get() as instance:
        assert run(instance, "released_adapter").success and in_use(two_adapters) == "second"
        assert run(instance).success
    assert in_use(two_adapters) == "second", f"{first} is better by the rules, but a person took it out of use"


def test_a_decision_between_the_evaluation_and_the_release_of_a_run_holds_up_nothing(two_adapters: Path) -> None:
    chapter = two_adapters / "chapter_markdowns" / "chapter_1.md"
    chapter.write_text(chapter.read_text("utf-8") + "\nA sentence that was not there before.\n", "utf-8")
    with dg.DagsterInstance.get() as instance:
        assert run(instance, *(stage.name for stage in STAGES if stage != RELEASED_ADAPTER)).success
    assert ft_dagster("release", "promote", "second", "--why", "while it ran").returncode == 0
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert "adapter_evaluation another adapter was released since" in on_one_line(done.stderr)
    assert ft_dagster("plan").returncode == 0


def test_a_missing_folder_of_texts_is_refused_before_anything_runs(two_adapters: Path) -> None:
    recipe = two_adapters / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("general: null", "general: nowhere"))
    for command in ("plan", "run"):
        done = ft_dagster(command)
        assert done.returncode == 1 and "evaluation.general" in done.stderr and "nowhere" in on_one_line(done.stderr)
