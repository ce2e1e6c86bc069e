"""The complete graph on a tiny base: what runs, is reused, is held back and is released."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from graphs import TOKEN, run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dagster.config.settings import load_settings
from ft_dagster.corpus.sections import stored_shards
from ft_dagster.definitions import defs
from ft_dagster.defs.assets.external import look, record
from ft_dagster.defs.automation.plan import make_plan
from ft_dagster.defs.automation.sensor import BRING_UP_TO_DATE
from ft_dagster.defs.clean import find_removable
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    STAGES,
    Reason,
    Stage,
    all_materializations,
    latest_materialization,
    reason_stale,
    stale_stages,
)
from ft_dagster.defs.workspace import Workspace
from ft_dagster.model.manifest import read_manifest
from ft_dagster.runtime.number_format import ProductRates
from ft_dagster.store.hashing import file_digest
from ft_dagster.store.local import Artifact
from ft_dagster.training.request import CODE_VERSION


def metadata(result: dg.ExecuteInProcessResult, name: str) -> dict[str, Any]:
    (event,) = (e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey(name))
    return {key: value.value for key, value in event.materialization.metadata.items()}


def materialized(result: dg.ExecuteInProcessResult) -> set[str]:
    return {e.asset_key.to_user_string() for e in result.get_asset_materialization_events() if e.asset_key}


def stale(instance: dg.DagsterInstance, stage: Stage) -> Reason | None:
    return reason_stale(all_materializations(instance), stage, Workspace(), Workspace().recipe, {})


def test_chapters_become_a_released_adapter_that_loads_without_this_package(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path], tiny_base: Path
) -> None:
    result = run(instance)
    assert result.success
    assert materialized(result) == {stage.name for stage in STAGES}
    warned = {check.check_name for check in result.get_asset_check_evaluations() if not check.passed}
    assert warned == {"no_held_out_text_in_train"}, "these chapters have sentences in common"
    assert {check.check_name for check in result.get_asset_check_evaluations()} == {
        "every_file_is_readable",
        "no_keys_or_personal_data",
        "ledger_balances",
        "no_held_out_text_in_train",
        "loss_is_finite",
        "adapter_reloads_and_differs_from_base",
        "every_token_is_supervised_once_an_epoch",
        "pieces_in_a_row_do_not_see_each_other",
        "it_beats_base_and_released",
        "general_text_is_not_forgotten",
        "instructions_are_still_followed",
        "text_is_not_recited",
        "keeps_up_with_reports",
    }
    evaluation = metadata(result, "adapter_evaluation")
    assert evaluation["bits per byte: new"] < evaluation["bits per byte: base"]
    assert metadata(result, "released_adapter")["decision"] == "release"
    observed = [e.asset_observation_data.asset_observation for e in result.get_asset_observation_events()]
    steps = [o.metadata["step"].value for o in observed if o.asset_key == dg.AssetKey("lora_adapter")]
    assert steps == list(range(1, metadata(result, "lora_adapter")["steps"] + 1)), "metrics come while it trains"
    assert {"loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= observed[0].metadata.keys()
    folder = workspace / "fine_tuned_model"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
    inputs = AutoTokenizer.from_pretrained(folder)("The committee", return_tensors="pt")
    with model.disable_adapter():
        base = model(**inputs).logits
    assert not base.equal(model(**inputs).logits)
    manifest = json.loads((folder / "manifest.json").read_text())
    trained_on = {row["chapter"] for row in manifest["trained_on"]}
    assert trained_on | set(manifest["held_out"]) == {path.stem for path in chapters}
    assert manifest["chapters"] == {
        path.stem: {f"chapter_markdowns/{path.name}": file_digest(path)} for path in chapters
    }
    assert not trained_on & set(manifest["held_out"])


def test_when_nothing_changed_nothing_is_stale_and_a_run_trains_nothing(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    workspace_now = Workspace()
    assert stale_stages(up_to_date, workspace_now) == []
    logs = sorted((workspace / "logs").glob("*.log"))
    again = run(up_to_date)
    assert metadata(again, "lora_adapter")["reused"] is True
    assert sorted((workspace / "logs").glob("*.log")) == logs, "no process was started"
    assert stale_stages(up_to_date, workspace_now) == []


def test_an_edit_trains_again_and_reverting_it_restores_the_earlier_adapter(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    first = (workspace / "fine_tuned_model").resolve().name
    held_out = json.loads((workspace / "fine_tuned_model" / "manifest.json").read_text())["held_out"]
    chapters = sorted((workspace / "chapter_markdowns").iterdir())
    edited = next(path for path in chapters if path.stem not in held_out)
    before = edited.read_text()
    edited.write_text(before + "\nA sentence that was not there before.\n")
    record(up_to_date, look(load_settings()), Workspace().recipe)
    reasons = {stage.name: reason.text for stage, reason in stale_stages(up_to_date, Workspace())}
    assert reasons["raw_chapters"] == "report_files has new content"
    logs = set((workspace / "logs").glob("evaluation-*.log"))
    edit = run(up_to_date)
    second = metadata(edit, "lora_adapter")
    assert second["reused"] is False and second["artifact"] != first
    (log,) = set((workspace / "logs").glob("evaluation-*.log")) - logs
    assert "Measuring new; measured before: base, released" in log.read_text()  # the held-out chapters are the same
    assert 0 < metadata(edit, "adapter_evaluation")["share of training and evaluation"] < 1
    edited.write_text(before)
    again = run(up_to_date)
    third = metadata(again, "lora_adapter")
    assert third["reused"] is True and third["artifact"] == first
    assert metadata(again, "released_adapter")["adapter"] == first


def test_an_edit_of_held_out_text_is_measured_with_the_existing_adapter(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    first = read_manifest(workspace / "fine_tuned_model")
    edited = next(path for path in (workspace / "chapter_markdowns").iterdir() if path.stem in first.held_out)
    edited.write_text(edited.read_text() + "\nA sentence that no adapter has seen.\n")
    plan = make_plan(up_to_date, Workspace())
    outcomes = {stage.stage: stage.outcome for stage in plan.stages}
    assert (outcomes["lora_adapter"], outcomes["adapter_evaluation"]) == ("unchanged", "runs")
    assert not plan.trains and plan.steps == 0
    before = latest_materialization(up_to_date, ADAPTER_EVALUATION.key)
    result = run(up_to_date)
    assert result.success and metadata(result, "lora_adapter")["reused"] is True
    assert (
        before and before.metadata["held-out bytes"].value != metadata(result, "adapter_evaluation")["held-out bytes"]
    )
    assert read_manifest(workspace / "fine_tuned_model") == first
    assert stale_stages(up_to_date, Workspace()) == []


def test_with_start_last_training_continues_the_released_adapter_on_new_text(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    training = tiny_recipe["training"] | {"start": "last", "replay": 0.0}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"training": training}))
    first = read_manifest(workspace / "fine_tuned_model")
    chapters = sorted((workspace / "chapter_markdowns").iterdir())
    edited = next(path for path in chapters if path.stem not in first.held_out)
    before = edited.read_text()
    edited.write_text(before + "\nA sentence that was not there before.\n")
    result = run(up_to_date)
    assert result.success and metadata(result, "lora_adapter")["started from"] == first.key
    second = Workspace().store.get("lora_adapter", metadata(result, "lora_adapter")["artifact"])
    learned = {item["section"] for item in read_manifest(second.path).trained_on}
    assert learned > {item["section"] for item in first.trained_on}  # the old version of the section is still in it
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    reached = checks["every_token_is_supervised_once_an_epoch"].metadata["reached the loss"].value
    assert 0 < reached < checks["every_token_is_supervised_once_an_epoch"].metadata["in the dataset"].value
    edited.write_text(before + "\nA sentence that was not there before, and one more.\n")
    run(up_to_date)
    edited.write_text(before + "\nA sentence that was not there before.\n")
    again = metadata(run(up_to_date), "lora_adapter")
    assert again["reused"] is True and again["artifact"] == second.key


def test_an_edit_that_leaves_the_sections_equal_stops_there(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    text = chapter.read_text()
    chapter.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    result = run(up_to_date, "raw_chapters", "sections")
    assert result.success
    assert stale_stages(up_to_date, Workspace()) == []


def test_a_recipe_change_is_reported_as_the_reason(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe["lora"]["rank"] = 2
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    stale = {stage.name: reason.text for stage, reason in stale_stages(up_to_date, Workspace())}
    assert stale["lora_adapter"] == "the recipe changed (base, objectives, lora, training)"
    assert "tokenized_dataset" not in stale and "sections" not in stale
    result = run(up_to_date, *stale)
    assert result.success and metadata(result, "lora_adapter")["reused"] is False


def test_a_code_change_and_a_changed_base_are_reported_as_reasons(
    up_to_date: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = next(stage for stage in STAGES if stage.name == "lora_adapter")
    object.__setattr__(adapter, "code_version", CODE_VERSION + "-next")
    try:
        assert str(stale(up_to_date, adapter)) == "its code changed"
    finally:
        object.__setattr__(adapter, "code_version", CODE_VERSION)
    up_to_date.report_runless_asset_event(
        dg.AssetMaterialization("base_model", tags={"dagster/data_version": "another"})
    )
    assert str(stale(up_to_date, adapter)) == "base_model has new content"


def test_a_file_that_cannot_be_read_stops_the_run_before_training_and_is_named(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path]
) -> None:
    (workspace / "chapter_markdowns" / "latin.md").write_bytes("# Café\n".encode("latin-1"))
    result = run(instance)
    assert not result.success
    assert materialized(result) == {"raw_chapters", "sections"}
    (check,) = (c for c in result.get_asset_check_evaluations() if not c.passed)
    assert (
        check.description is not None and "chapter_markdowns/latin.md: byte 5 (0xe9) is not UTF-8" in check.description
    )
    assert str(stale(instance, STAGES[1])) == "a blocking check failed"
    alone = run(instance, "tokenized_dataset")
    assert not alone.success, "the check cannot be stepped around by materializing what comes after it"


def test_a_recipe_may_leave_unreadable_files_out_and_they_are_counted(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any]
) -> None:
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"corpus": {"unreadable": "skip"}}))
    (workspace / "chapter_markdowns" / "latin.md").write_bytes("# Café\n".encode("latin-1"))
    result = run(instance, "raw_chapters", "sections", "tokenized_dataset")
    assert result.success
    assert "left out: unreadable file | 7" in metadata(result, "tokenized_dataset")["ledger"]


def test_an_adapter_that_does_not_beat_the_released_one_is_held_back_with_the_reason(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    released = load_file(workspace / "fine_tuned_model" / "adapter_model.safetensors")
    tiny_recipe["training"] |= {"epochs": 0.3, "learning_rate": 2e-3}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    result = run(up_to_date)
    kept = metadata(result, "released_adapter")
    assert kept["decision"] == "keep" and "gain over the released -" in kept["reason"]
    now = load_file(workspace / "fine_tuned_model" / "adapter_model.safetensors")
    assert all(now[name].equal(released[name]) for name in released)


def test_a_run_reports_why_training_failed_and_warns_of_a_slow_format_beforehand(
    instance: dg.DagsterInstance,
    workspace: Path,
    chapters: list[Path],
    tiny_recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = ProductRates("cpu", {"float32": 80e9, "bfloat16": 1e9})
    monkeypatch.setattr("ft_dagster.defs.automation.cost.machine_rates", lambda _: slow)
    tiny_recipe["base"]["dtype"] = "bfloat16"
    tiny_recipe["training"] |= {"learning_rate": 1e30, "warmup": 0.0}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    result = run(instance)
    said = [entry.user_message for entry in instance.all_logs(result.run_id)]
    (warned,) = (i for i, text in enumerate(said) if "base.dtype: bfloat16 in the recipe is slow" in text)
    (started,) = (i for i, text in enumerate(said) if "ft_dagster.training runs as process" in text)
    assert warned < started
    (failure,) = result.get_step_failure_events()
    assert failure.step_key == "lora_adapter"
    message = failure.step_failure_data.user_failure_data.description
    assert "ended with exit code 1" in message and "Lower training.learning_rate" in message


def test_pairs_that_a_recipe_teaches_are_shown_with_those_that_are_left_out(
    instance: dg.DagsterInstance, workspace: Path, tiny_recipe: dict[str, Any]
) -> None:
    tiny_recipe |= {"objectives": {"text": 0.0, "rewrite": 1.0}, "tokens": {"block_length": 200, "held_out": 0.2}}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    (workspace / "outputs" / "consolidated").mkdir(parents=True)
    (workspace / "chapter_markdowns" / "chapter_9.md").write_text("## Prose\n\nNo original.\n")
    for number in (1, 2):
        sections = {
            "A": {"original": "was", "improved": f"is {number}"},
            "B": {"original": "was " * 300, "improved": f"is longer {number}"},
        }
        path = workspace / "outputs" / "consolidated" / f"chapter_{number}.json"
        path.write_text(json.dumps({"sections": sections}))
    result = run(instance, "raw_chapters", "sections", "tokenized_dataset")
    assert result.success
    found = metadata(result, "tokenized_dataset")
    assert metadata(result, "sections")["pairs of original and improved text"] == 4
    assert [found[name] for name in ("objectives", "train pairs", "held-out pairs", "pairs left out")] == [
        "rewrite",
        1,
        1,
        2,
    ]
    assert "pair longer than a block" in found["pairs left out by reason"]
    assert "chapter_1" in found["pairs left out by name"] and "chapter_2" in found["pairs left out by name"]
    assert "no original to rewrite it from" in found["ledger"]
    assert found["share of usable text"] < 1


def test_an_asset_without_its_input_says_what_to_materialize(
    instance: dg.DagsterInstance, chapters: list[Path]
) -> None:
    result = run(instance, "sections")
    (failure,) = result.get_step_failure_events()
    assert "raw_chapters has not been materialized" in failure.step_failure_data.user_failure_data.description


def test_a_damaged_artifact_is_detected_before_it_is_used(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path]
) -> None:
    assert run(instance, "raw_chapters", "sections").success
    (folder,) = (workspace / ".ft" / "store" / "sections").iterdir()
    artifact = Artifact.open(folder)
    lines = artifact.store.blob_path(stored_shards(artifact)[0].lines)
    data = bytearray(lines.read_bytes())
    data[10] ^= 1
    lines.write_bytes(data)
    result = run(instance, "tokenized_dataset")
    (failure,) = result.get_step_failure_events()
    assert f"{lines} is damaged" in str(failure.step_failure_data.error)


def test_the_hub_token_is_in_nothing_that_was_written(
    up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path
) -> None:
    assert load_settings().token == TOKEN, "the runs that brought the workspace up to date had it"
    folders = (workspace, tmp_path / "home")
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(written) > 20 and any(path.suffix == ".db" for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_an_artifact_missing_from_the_store_is_made_again(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    (artifact,) = (workspace / ".ft" / "store" / "tokenized_dataset").iterdir()
    shutil.rmtree(artifact)
    stale = {stage.name: reason.text for stage, reason in stale_stages(up_to_date, Workspace())}
    assert stale["tokenized_dataset"] == "its artifact is missing from the store"
    result = run(up_to_date, *stale)
    assert result.success and metadata(result, "lora_adapter")["reused"] is True


def test_a_fine_tuned_model_that_was_removed_or_replaced_is_restored(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    released = (workspace / "fine_tuned_model").resolve()
    (workspace / "fine_tuned_model").unlink()
    (workspace / "fine_tuned_model").mkdir()
    ((stage, reason),) = stale_stages(up_to_date, Workspace())
    assert (stage.name, reason.text) == ("released_adapter", "fine_tuned_model is not what was released")
    assert run(up_to_date, "released_adapter").success
    assert (workspace / "fine_tuned_model").resolve() == released
    assert (workspace / "fine_tuned_model.before-1").is_dir()
    assert stale_stages(up_to_date, Workspace()) == []


def test_releasing_an_adapter_by_hand_makes_the_evaluation_stale(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    link = workspace / "fine_tuned_model"
    other = link.resolve().with_name("other")
    shutil.copytree(link.resolve(), other)
    link.unlink()
    link.symlink_to(other)
    reasons = {stage.name: reason.text for stage, reason in stale_stages(up_to_date, Workspace())}
    assert reasons["adapter_evaluation"] == "another adapter was released since"


def test_a_materialization_reported_by_hand_is_stale_until_a_real_run(up_to_date: dg.DagsterInstance) -> None:
    up_to_date.report_runless_asset_event(dg.AssetMaterialization("sections"))
    assert "sections" in {stage.name for stage, _ in stale_stages(up_to_date, Workspace())}
    assert "sections" in {stage.stage for stage in make_plan(up_to_date, Workspace()).stages}
    assert find_removable(up_to_date, Workspace()).paths.keys() <= {
        "sections",
        "files of chapters, sections and datasets",
    }
    assert run(up_to_date, "sections").success
    assert stale_stages(up_to_date, Workspace()) == []


def test_text_that_was_present_only_while_a_run_read_it_makes_the_graph_stale(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    chapter = workspace / "chapter_markdowns" / "chapter_1.md"
    before = chapter.read_text()
    chapter.write_text(before + "\nWithdrawn.\n")
    job = defs.resolve_job_def(BRING_UP_TO_DATE)  # as from the UI, without a scan of the reports before
    selection = [dg.AssetKey("raw_chapters"), dg.AssetKey("sections")]
    assert job.execute_in_process(instance=up_to_date, asset_selection=selection).success
    chapter.write_text(before)
    record(up_to_date, look(load_settings()), Workspace().recipe)
    assert {s.name: r.text for s, r in stale_stages(up_to_date, Workspace())}["raw_chapters"] == (
        "report_files has new content"
    )


def test_an_adapter_of_another_base_is_replaced_only_when_the_recipe_says_so(
    up_to_date: dg.DagsterInstance, workspace: Path, tiny_base: Path, tiny_recipe: dict[str, Any]
) -> None:
    other = workspace / "other-base"
    shutil.copytree(tiny_base, other)
    (other / "chat_template.jinja").write_text("another template")
    tiny_recipe["base"]["model"] = "other-base"
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    released = (workspace / "fine_tuned_model").resolve()
    kept = metadata(run(up_to_date), "released_adapter")
    assert kept["decision"] == "keep" and "belongs to another base model" in kept["reason"]
    assert (workspace / "fine_tuned_model").resolve() == released
    (workspace / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_recipe | {"release": {"other_base": True, "minimum_held_out": 0}})
    )
    result = run(up_to_date, "adapter_evaluation", "released_adapter")
    assert metadata(result, "released_adapter")["decision"] == "release"
    assert (workspace / "fine_tuned_model").resolve() != released
