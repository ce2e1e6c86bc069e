"""A plan shows what a run would do and why, without changing anything."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from graphs import run
from reports import prose_of
from rich.console import Console

from ft_dagster.base.embedded import EMBEDDED
from ft_dagster.cli.summary import print_plan
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.defs.automation.plan import Plan, StagePlan, make_plan
from ft_dagster.defs.automation.refusals import Refusal
from ft_dagster.defs.stages import STAGES
from ft_dagster.defs.workspace import Workspace
from ft_dagster.runtime.number_format import ProductRates
from ft_dagster.training.sizing.steps import optimizer_steps

ALL = [stage.name for stage in STAGES]


def planned(instance: dg.DagsterInstance) -> Plan:
    return make_plan(instance, Workspace())


def outcomes(plan: Plan) -> dict[str, str]:
    return {stage.stage: stage.outcome for stage in plan.stages}


def train_chapter(workspace: Path) -> Path:
    """Return a chapter that is trained on."""
    held_out = json.loads((workspace / "fine_tuned_model" / "manifest.json").read_text())["held_out"]
    return next(p for p in sorted((workspace / "chapter_markdowns").iterdir()) if p.stem not in held_out)


def edit(chapter: Path) -> str:
    before = chapter.read_text()
    chapter.write_text(before + "\nThree words more.\n")
    return before


def snapshot(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    """Return every file with its bytes, and only the names of Dagster's own databases."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {
        path: (path.stat().st_mtime_ns, b"") if path.suffix == ".db" else (0, path.read_bytes())
        for path in files
        if not path.name.endswith(("-wal", "-shm", "-journal"))
    }


def test_with_nothing_changed_there_is_nothing_to_do(up_to_date: dg.DagsterInstance) -> None:
    plan = planned(up_to_date)
    assert plan.nothing_to_do and not (plan.added or plan.edited or plan.removed)


def test_added_changed_and_deleted_chapters_are_named_with_their_words(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    edited = train_chapter(workspace)
    words = len(edit(edited).split())
    (edited.parent / "chapter_9.md").write_text("## New\n\nFour words of text.\n")
    gone = next(path for path in edited.parent.iterdir() if path not in (edited, edited.parent / "chapter_9.md"))
    gone_words = len(gone.read_text().split())
    gone.unlink()
    plan = planned(up_to_date)
    assert [(c.chapter, c.words) for c in plan.added] == [("chapter_9", 6)]
    assert [(c.chapter, c.words_before, c.words) for c in plan.edited] == [(edited.stem, words, words + 3)]
    assert [(c.chapter, c.words) for c in plan.removed] == [(gone.stem, gone_words)]


def test_the_name_of_a_chapter_cannot_control_the_terminal(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    report = {
        "metadata": {"chapter": "\x1b]0;title\x07[red]\n" + "x" * 300, "section": "A"},
        "final_result": {"final_text": "Text of it."},
    }
    folder = workspace / "outputs" / "consolidated"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.json").write_text(json.dumps(report))
    console = Console(width=1000, record=True, file=StringIO())
    print_plan(planned(up_to_date), console)
    printed = console.export_text()
    assert r"  \x1b]0;title\x07[red]\nxxx" in printed and "xxx...: 3 words" in printed
    assert "\x1b" not in printed and "\x07" not in printed


def test_the_tokens_and_steps_of_the_plan_are_those_of_the_run(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    edit(train_chapter(workspace))
    plan = planned(up_to_date)
    assert plan.exact and plan.trains and list(outcomes(plan)) == ALL
    assert set(outcomes(plan).values()) == {"runs"} and plan.seconds is not None and plan.seconds > 0
    result = run(up_to_date)
    assert result.success
    done = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }
    assert done["tokenized_dataset"]["train tokens"].value == plan.train_tokens
    assert done["lora_adapter"]["steps"].value == plan.steps
    assert planned(up_to_date).nothing_to_do


def test_a_plan_changes_nothing(up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path) -> None:
    edit(train_chapter(workspace))
    (workspace / "chapter_markdowns" / "new.md").write_text("## New\n\nText.\n")
    before = snapshot(workspace, tmp_path / "cache")
    runs = up_to_date.get_runs_count()
    assert not planned(up_to_date).nothing_to_do
    assert snapshot(workspace, tmp_path / "cache") == before
    assert up_to_date.get_runs_count() == runs


def test_an_invisible_change_stops_at_the_stage_that_finds_nothing_changed(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = train_chapter(workspace)
    chapter.write_text("\ufeff" + chapter.read_text() + "\n\n\n")
    plan = planned(up_to_date)
    assert outcomes(plan) == {"raw_chapters": "runs", "sections": "unchanged"}
    assert not plan.trains and plan.steps == 0
    assert run(up_to_date, *outcomes(plan)).success
    assert planned(up_to_date).nothing_to_do


def test_reverting_an_edit_will_reuse_the_earlier_adapter(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    chapter = train_chapter(workspace)
    before = edit(chapter)
    assert run(up_to_date).success
    chapter.write_text(before)
    plan = planned(up_to_date)
    assert outcomes(plan)["lora_adapter"] == "reused" and not plan.trains and plan.steps == 0


def test_each_reason_is_reported_with_its_kind(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_base: Path, tiny_recipe: dict[str, Any]
) -> None:
    def reasons() -> dict[str, str]:
        return {stage.stage: stage.kind for stage in planned(up_to_date).stages}

    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"lora": {"rank": 2}}))
    assert reasons()["lora_adapter"] == "recipe" and "tokenized_dataset" not in reasons()
    shutil.copytree(tiny_base, workspace / "other-base")
    (workspace / "other-base" / "chat_template.jinja").write_text("another template")
    tiny_recipe["base"]["model"] = "other-base"
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    assert reasons()["lora_adapter"] == "recipe" and reasons()["tokenized_dataset"] == "base"
    tiny_recipe["base"]["model"] = str(tiny_base)
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    assert reasons() == {}
    adapter = next(stage for stage in STAGES if stage.name == "lora_adapter")
    version = adapter.code_version
    object.__setattr__(adapter, "code_version", "next")
    try:
        assert reasons()["lora_adapter"] == "code"
    finally:
        object.__setattr__(adapter, "code_version", version)
    (artifact,) = (workspace / ".ft" / "store" / "adapter_evaluation").iterdir()
    shutil.rmtree(artifact)
    assert reasons()["adapter_evaluation"] == "missing"


def test_a_file_that_cannot_be_read_stops_the_plan_where_it_stops_the_run(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    (workspace / "chapter_markdowns" / "bad.md").write_bytes(b"\xff\xfe")
    plan = planned(up_to_date)
    assert outcomes(plan) == {"raw_chapters": "runs", "sections": "blocked"} and not plan.trains and plan.steps == 0
    (refused,) = plan.refused
    assert refused.path == "chapter_markdowns/bad.md" and "UTF-16" in refused.reason
    print_plan(plan, Console(file=(shown := StringIO()), width=1000))
    assert "The run stops before training because of\n  chapter_markdowns/bad.md: it is UTF-16" in shown.getvalue()
    assert not run(up_to_date).success
    plan = planned(up_to_date)
    assert outcomes(plan) == {"sections": "blocked"} and plan.stages[0].kind == "blocked"


def test_unreadable_files_are_named_also_if_too_much_changed_for_a_dry_run(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_dagster.defs.automation.plan._DRY_RUN_BYTES", 0)
    folder = workspace / "chapter_markdowns"
    (folder / "bad.md").write_bytes(b"caf\xe9")
    (folder / "missing.md").symlink_to(workspace / "nowhere.md")
    reports = workspace / "outputs" / "consolidated"
    reports.mkdir(parents=True)
    (reports / "broken.json").write_text("{")
    plan = planned(up_to_date)
    assert outcomes(plan) == {"raw_chapters": "runs", "sections": "blocked"} and not plan.trains
    assert {refusal.path for refusal in plan.refused} == {
        "chapter_markdowns/bad.md",
        "chapter_markdowns/missing.md",
        "outputs/consolidated/broken.json",
    }
    assert not run(up_to_date).success
    edit(folder / "chapter_1.md")  # the unreadable files are now old
    assert {refusal.path for refusal in planned(up_to_date).refused} == {refusal.path for refusal in plan.refused}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"corpus": {"unreadable": "skip"}}))
    assert planned(up_to_date).refused == [] and planned(up_to_date).steps


@pytest.mark.parametrize("training", [{"start": "last"}, {"patience": 1, "evaluate_every": 1}], ids=str)
def test_figures_are_an_upper_bound_if_training_may_be_shorter(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], training: dict[str, Any]
) -> None:
    edit(train_chapter(workspace))
    assert not planned(up_to_date).at_most
    (workspace / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_recipe | {"training": tiny_recipe["training"] | training})
    )
    plan = planned(up_to_date)
    assert plan.at_most
    print_plan(plan, Console(file=(shown := StringIO()), width=1000))
    assert f"at most {plan.steps} optimizer steps" in shown.getvalue()
    (held_out,) = plan.held_out
    assert plan.held_out_share and 0 < plan.held_out_share < 0.5
    assert f"Held out: {held_out} ({plan.held_out_share:.1%} of the text)." in shown.getvalue()


def test_names_from_reports_are_printed_as_they_are() -> None:
    for plan in (
        Plan(train_tokens=1, steps=1, trains=True, held_out=["one#Using [/INST] [b]tokens"], held_out_share=0.5),
        Plan(refused=[Refusal("notes [draft].md", "Using [/INST], line 1: a key")]),
    ):
        plan.stages.append(StagePlan("sections", "content", "changed", "runs"))
        print_plan(plan, Console(file=(shown := StringIO()), width=1000))
        assert "[/INST]" in shown.getvalue() and ("[b]tokens" in shown.getvalue() or "[draft]" in shown.getvalue())


@pytest.mark.parametrize(("epochs", "advised"), [(1, True), (20, False)])
def test_a_training_of_few_steps_is_advised_how_to_get_more(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], epochs: int, advised: bool
) -> None:
    tiny_recipe["training"] |= {"epochs": epochs, "rows_per_step": 1000}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    plan = planned(up_to_date)
    assert plan.steps == epochs
    if advised:
        assert plan.advice and "1 optimizer step(s) are too few" in plan.advice and "training.epochs: 20" in plan.advice
        print_plan(plan, Console(file=(shown := StringIO()), width=1000))
        assert plan.advice in shown.getvalue()
    else:
        assert plan.advice is None


def test_tokens_are_estimated_from_a_sample_in_the_script_of_the_reports(
    instance: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "คณะกรรมการประชุมกันในวันอังคารและอ่านรายงานตั้งแต่หน้าแรกจนถึงหน้าสุดท้าย "
    for number in range(3):
        text = f"# Chapter {number}\n\n" + "".join(f"{sentence}{number}{item} " for item in range(40))
        (workspace / "chapter_markdowns" / f"thai_{number}.md").write_text(text, "utf-8")
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    exact = planned(instance)
    monkeypatch.setattr("ft_dagster.defs.automation.plan._DRY_RUN_BYTES", 0)
    estimate = planned(instance)
    assert exact.exact and not estimate.exact and exact.train_tokens and estimate.train_tokens
    assert 0.8 < estimate.train_tokens / exact.train_tokens < 2, "held-out chapters are included in the estimate"


def test_personal_data_blocks_the_plan_where_it_blocks_the_run_if_the_recipe_says_so(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    train_chapter(workspace).write_text("Write to ann@reports.org.")
    assert outcomes(planned(up_to_date))["lora_adapter"] == "runs"
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"corpus": {"secrets": "block"}}))
    assert outcomes(planned(up_to_date)) == {"raw_chapters": "runs", "sections": "blocked"}
    result = run(up_to_date)
    assert not result.success
    (failed,) = [check for check in result.get_asset_check_evaluations() if not check.passed]
    assert failed.check_name == "no_keys_or_personal_data" and failed.metadata["E-mail address"].value == 1
    said = f"{failed.description} {failed.metadata}"
    assert "E-mail address" in said and "ann@" not in said
    assert outcomes(planned(up_to_date)) == {"sections": "blocked"}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    assert outcomes(planned(up_to_date))["sections"] == "unchanged"


def test_figures_are_marked_as_estimates_until_the_base_model_is_on_the_machine(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe["base"] = {"source": "embedded", "model": next(iter(EMBEDDED))}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    plan = planned(instance)
    (held_out,) = plan.held_out
    used = [prose_of(number) for number in range(1, 7) if f"chapter_{number}" != held_out]
    assert not plan.exact and plan.trains and plan.seconds is None
    assert plan.train_chapters == len(used) == 5, "those that are held out are not trained on"
    assert plan.train_tokens == pytest.approx(sum(map(len, used)) / 4, rel=0.05)
    assert [stage.kind for stage in plan.stages] == ["missing"] * len(STAGES)
    assert plan.training is not None and plan.training.memory_bytes is None
    assert plan.training.problem == "the base model is not on this machine yet"


def test_the_plan_shows_the_cost_of_training_by_formula_and_by_measurement(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(train_chapter(workspace))
    plan = planned(up_to_date)
    cost = plan.training
    assert cost is not None and cost.memory_bytes == sum(cost.memory_parts.values()) > 0
    assert cost.measured_memory_bytes and cost.measured_on == "cpu" and cost.problem is None
    assert cost.seconds and plan.seconds and plan.seconds > cost.seconds
    assert json.loads(json.dumps(plan.to_json()))["training"]["memory_bytes"] == cost.memory_bytes
    print_plan(plan, Console())
    shown = capsys.readouterr().out
    assert "at the speed last measured on cpu" in shown
    assert f"Memory: about {cost.memory_bytes / 2**30:.1f} GiB at the peak" in shown and "the last time" in shown
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"lora": {"rank": 2}}))
    other = planned(up_to_date)
    assert other.training and other.training.memory_bytes
    assert other.training.measured_memory_bytes is None and other.training.measured_on is None
    assert other.training.seconds, "by the model's operations, before anything was measured"
    print_plan(other, Console())
    assert "by the model's operations and how fast this machine is" in " ".join(capsys.readouterr().out.split())


def test_the_plan_says_that_a_training_will_be_refused_and_what_to_change(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_dagster.defs.automation.cost.memory_for_process", lambda: 2 * 10**9)
    tiny_recipe["tokens"]["block_length"] = 16384
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    cost = planned(up_to_date).training
    assert cost is not None and cost.problem is not None
    assert "it will be refused. With " in cost.problem and "GiB are available" in cost.problem


def test_a_model_the_formula_does_not_know_is_planned_without_memory(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_base: Path, tiny_recipe: dict[str, Any]
) -> None:
    shutil.copytree(tiny_base, workspace / "other-base")
    config = json.loads((tiny_base / "config.json").read_text()) | {"model_type": "gemma"}
    (workspace / "other-base" / "config.json").write_text(json.dumps(config))
    tiny_recipe["base"]["model"] = "other-base"
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    cost = planned(up_to_date).training
    assert cost is not None and cost.memory_bytes is None and "not 'gemma'" in str(cost.problem)


@pytest.mark.parametrize(("rows", "steps"), [(1, 3), (4, 3), (5, 6), (8, 6), (9, 9)])
def test_an_incomplete_last_batch_is_a_step(tiny_recipe: dict[str, Any], rows: int, steps: int) -> None:
    assert optimizer_steps(rows, resolve_recipe(tiny_recipe)) == steps  # 3 epochs, 4 rows per step


def test_remaking_everything_is_estimated_if_the_reports_are_large(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_dagster.defs.automation.plan._DRY_RUN_BYTES", 1000)
    tiny_recipe["tokens"]["block_length"] = 32
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    plan = planned(up_to_date)
    assert not plan.exact and outcomes(plan)["tokenized_dataset"] == "runs"
    assert outcomes(plan)["lora_adapter"] == "if needed" and plan.steps


def test_a_recipe_change_that_affects_no_weights_keeps_the_adapter(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe["training"]["save_every"] = 7
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    plan = planned(up_to_date)
    assert outcomes(plan) == {"lora_adapter": "unchanged"} and not plan.trains


SLOW = ProductRates("cpu", {"float32": 80e9, "bfloat16": 1e9})


def test_the_plan_warns_of_a_slow_number_format_and_names_the_line_to_change(
    up_to_date: dg.DagsterInstance,
    workspace: Path,
    tiny_recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ft_dagster.defs.automation.cost.machine_rates", lambda _: SLOW)
    tiny_recipe["base"]["dtype"] = "bfloat16"
    tiny_recipe["training"]["seed"] = 1
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    print_plan(planned(up_to_date), Console(width=1000))
    assert (
        "base.dtype: bfloat16 in the recipe is slow on this machine: its matrix products take about 80 times as long "
        "as in float32. Write base.dtype: auto, or float32." in capsys.readouterr().out
    )
    del tiny_recipe["base"]["dtype"]
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    cost = planned(up_to_date).training
    assert cost is not None and (cost.number_format, cost.slow) == ("float32", None)


def test_the_plan_leaves_the_number_format_open_if_steps_run_elsewhere(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe["training"]["seed"] = 1
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    monkeypatch.setenv("FT_EXECUTOR", "ray")
    cost = planned(up_to_date).training
    assert cost is not None and (cost.number_format, cost.where) == (None, "decided where the step runs")
