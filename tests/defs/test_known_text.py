"""What is held out as a run sees it: text that both sides contain, and reports that cannot be divided."""

from pathlib import Path

import dagster as dg
import pytest
from graphs import run
from reports import PROSE, prose_of

from ft_dagster.defs.assets.tokenized_dataset import _separate
from ft_dagster.defs.automation.plan import make_plan
from ft_dagster.defs.runs.state import failure_message
from ft_dagster.defs.workspace import Workspace

ONE_TEXT = prose_of(1) + "\n" + "".join(reversed(PROSE))
CHECK = "no_held_out_text_in_train"


def check_of(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (found,) = (check for check in result.get_asset_check_evaluations() if check.check_name == CHECK)
    return found


def test_copies_of_one_text_stop_the_run_and_the_plan_says_so_before(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path]
) -> None:
    for number, chapter in enumerate(chapters):
        chapter.write_text(f"# Revision {number}\n\n{ONE_TEXT}\nRevised {number} times.\n")
    plan = make_plan(instance, Workspace())
    (refusal,) = plan.refused
    assert refusal.path == "the reports" and "100.0% of the held-out text is on the train side" in refusal.reason
    assert [stage.outcome for stage in plan.stages] == ["runs", "runs", "blocked"] and not plan.trains
    result = run(instance)
    assert not result.success and not (workspace / "fine_tuned_model").exists()
    check = check_of(result)
    assert not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    assert check.metadata["held-out text known from train"].value == 1.0
    assert "change tokens.held_out in the recipe" in (check.description or "")


@pytest.mark.parametrize(
    ("known", "passed", "severity"), [(0.05, True, "WARN"), (0.2, False, "WARN"), (0.5, False, "ERROR")]
)
def test_a_quotation_of_held_out_text_is_a_warning_and_most_of_it_an_error(
    known: float, passed: bool, severity: str
) -> None:
    found = _separate({"checks": {"sections on both sides": 0}, "known": known})
    assert found.passed == passed and found.severity == dg.AssetCheckSeverity[severity]
    assert (found.description is None) == passed


def test_a_report_of_one_section_is_named_by_the_plan_as_by_the_run(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path]
) -> None:
    for chapter in chapters[1:]:
        chapter.unlink()
    plan = make_plan(instance, Workspace())
    (refusal,) = plan.refused
    assert "one chapter with one section" in refusal.reason
    assert plan.stages[-1].stage == "tokenized_dataset" and plan.stages[-1].outcome == "blocked"
    (event,) = run(instance).get_step_failure_events()
    assert "one chapter with one section" in failure_message(event)
