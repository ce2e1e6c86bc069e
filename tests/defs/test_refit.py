"""With `release.refit`, what is released was trained on all text, after an adapter that was not had passed the gate."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from graphs import run

from ft_dagster.cli.summary import summarize
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.config.settings import load_settings
from ft_dagster.defs.assets.refit import recipe_for_refit
from ft_dagster.defs.automation.plan import make_plan
from ft_dagster.defs.clean import find_removable
from ft_dagster.defs.releasing import promote, roll_back
from ft_dagster.defs.stages import LORA_ADAPTER, TOKENIZED_DATASET, stale_stages
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation import find_or_evaluate
from ft_dagster.model.manifest import read_manifest
from ft_dagster.release.lineage import restore
from ft_dagster.release.publish import model_card


@pytest.fixture
def refits(workspace: Path, chapters: list[Path], tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a workspace that refits."""
    tiny_recipe["release"] |= {"refit": True, "recited": 1.0}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return tiny_recipe


def released(workspace: Path) -> Any:
    return read_manifest(workspace / "fine_tuned_model")


def adapters() -> set[str]:
    return set(Workspace().store.keys(LORA_ADAPTER.name))


def test_the_released_adapter_has_learned_every_section_and_names_the_one_that_was_measured(
    instance: dg.DagsterInstance, workspace: Path, refits: dict[str, Any]
) -> None:
    plan = make_plan(instance, Workspace())
    assert plan.refit is not None and plan.held_out
    assert run(instance).success
    manifest = released(workspace)
    store = Workspace().store
    measured = read_manifest(store.get(LORA_ADAPTER.name, manifest.refit_of).path)
    assert measured.held_out == plan.held_out and manifest.held_out == [] and measured.refit_of == ""
    assert {item["chapter"] for item in manifest.trained_on} == manifest.chapters.keys()
    assert {item["chapter"] for item in measured.trained_on} == manifest.chapters.keys() - set(plan.held_out)
    assert summarize(instance, load_settings())["never_trained_on"] == []
    (entry,) = Workspace().releases.history()
    assert entry["measured"] == measured.key and "trained again on all text" in entry["why"]["reason"]
    tokens = [store.get(TOKENIZED_DATASET.name, m.made_from[TOKENIZED_DATASET.name]) for m in (measured, manifest)]
    before, after = (found.about["splits"] for found in tokens)
    assert after["train"]["tokens"] == before["train"]["tokens"] + before["held_out"]["tokens"]
    evaluation = store.newest("adapter_evaluation", adapter=manifest.refit_of)
    assert evaluation is not None
    card = model_card(manifest, evaluation.about)
    assert f"Measured on `{manifest.refit_of}`" in card and "evaluated on 0 chapters" not in card
    assert stale_stages(instance, Workspace()) == [] and make_plan(instance, Workspace()).nothing_to_do


def test_the_next_adapter_is_compared_with_the_measured_one_and_clean_keeps_it(
    instance: dg.DagsterInstance,
    workspace: Path,
    chapters: list[Path],
    refits: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(instance).success
    first = released(workspace)
    edited = next(path for path in chapters if path.stem not in read_held_out(first))
    edited.write_text(edited.read_text() + "\nOne more sentence on what the committee read.\n")
    assert run(instance).success
    store = Workspace().store
    evaluation = next(e for e in store.all("adapter_evaluation") if e.about.get("in_use"))
    assert evaluation.about["in_use"] == first.refit_of
    assert "do not count" not in evaluation.about["verdict"]["reason"], "no held-out text was learned"
    monkeypatch.setenv("FT_KEEP_ADAPTERS", "1")
    assert {first.refit_of, first.key} <= set(find_removable(instance, Workspace()).kept_adapters)
    promote(instance, Workspace(), evaluation.about["adapter"], "to see it used")
    assert Workspace().releases.measured() == evaluation.about["adapter"]
    roll_back(instance, Workspace(), first.key, "the sentence is wrong")
    assert Workspace().releases.current() == first.key and Workspace().releases.measured() == first.refit_of
    assert {first.key, first.refit_of} <= Workspace().releases.proven()


def read_held_out(manifest: Any) -> list[str]:
    return list(read_manifest(Workspace().store.get(LORA_ADAPTER.name, manifest.refit_of).path).held_out)


def test_where_the_refit_forgets_the_measured_adapter_is_released_with_the_reason(
    instance: dg.DagsterInstance, workspace: Path, refits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refits["evaluation"] |= {"general": "shipped"}
    refits["release"] |= {"general_loss": 50.0}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    judge = find_or_evaluate.judge_refit

    def strict(models: Any, options: Any, missing: Any) -> Any:
        return judge(models, options.model_copy(update={"general_loss": -50.0}), missing)

    monkeypatch.setattr(find_or_evaluate, "judge_refit", strict)
    assert run(instance).success
    manifest = released(workspace)
    assert manifest.refit_of == "" and manifest.held_out
    (entry,) = Workspace().releases.history()
    assert "it was not trained again on all text for release" in entry["why"]["reason"]
    assert "loss on general text" in entry["why"]["reason"]
    assert len(adapters()) == 2 and stale_stages(instance, Workspace()) == []


def test_a_refit_is_made_again_from_what_lineage_restores(
    instance: dg.DagsterInstance,
    workspace: Path,
    refits: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(instance).success
    manifest = released(workspace)
    restore(Workspace().store, manifest, tmp_path / "again")
    monkeypatch.setenv("FT_WORKSPACE", str(tmp_path / "again"))
    with dg.DagsterInstance.ephemeral() as other:
        assert run(other).success
    again = read_manifest(tmp_path / "again" / "fine_tuned_model")
    assert (again.key, again.files) == (manifest.key, manifest.files)


def test_switching_the_field_trains_only_the_refit_and_back_only_switches(
    instance: dg.DagsterInstance, workspace: Path, refits: dict[str, Any]
) -> None:
    refits["release"] |= {"refit": False}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert run(instance).success
    measured = released(workspace)
    evaluations = set(Workspace().store.keys("adapter_evaluation"))
    refits["release"] |= {"refit": True}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert [(stage.name, reason.kind) for stage, reason in stale_stages(instance, Workspace())] == [
        ("released_adapter", "recipe")
    ]
    plan = make_plan(instance, Workspace())
    assert not plan.trains and plan.refit is not None
    assert run(instance).success
    refit = released(workspace)
    assert refit.refit_of == measured.key
    assert len(set(Workspace().store.keys("adapter_evaluation")) - evaluations) == 1, "that of the refit"
    refits["release"] |= {"refit": False}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert run(instance).success
    assert released(workspace).key == measured.key and adapters() == {measured.key, refit.key}


def test_early_stopping_lets_the_refit_train_for_as_long_as_the_kept_weights(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["training"] |= {"evaluate_every": 2, "patience": 2}
    recipe = resolve_recipe(tiny_recipe)
    measured: Any = SimpleNamespace(about={"kept_step": 4, "planned_steps": 12})
    training = recipe_for_refit(recipe, measured, measured).training
    assert (training.evaluate_every, training.patience, training.epochs) == (None, None, 1.0)
    tiny_recipe["training"] |= {"evaluate_every": None, "patience": None}
    assert recipe_for_refit(resolve_recipe(tiny_recipe), measured, measured).training.epochs == 3


def test_a_refit_in_use_outlives_the_loss_of_the_store(
    instance: dg.DagsterInstance, workspace: Path, refits: dict[str, Any]
) -> None:
    assert run(instance).success
    before = released(workspace)
    shutil.rmtree(workspace / ".ft" / "store")
    assert run(instance).success
    assert released(workspace) == before and Workspace().releases.measured() == before.refit_of
    assert stale_stages(instance, Workspace()) == []


def test_a_refit_that_a_person_took_out_of_use_does_not_come_back(
    instance: dg.DagsterInstance, workspace: Path, refits: dict[str, Any]
) -> None:
    assert run(instance).success
    refit = released(workspace)
    promote(instance, Workspace(), refit.refit_of, "the refit says too much")
    refits["evaluation"] |= {"train_tokens": 2048}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert run(instance).success
    assert Workspace().releases.current() == refit.refit_of
    assert stale_stages(instance, Workspace()) == []


def test_what_a_person_put_in_use_stays_when_refitting_is_switched_on(
    instance: dg.DagsterInstance, workspace: Path, chapters: list[Path], refits: dict[str, Any]
) -> None:
    refits["release"] |= {"refit": False}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert run(instance).success
    first = released(workspace)
    edited = next(path for path in chapters if path.stem not in first.held_out)
    edited.write_text(edited.read_text() + "\nOne more sentence on what the committee read.\n")
    assert run(instance).success
    (second,) = adapters() - {first.key}
    other = second if Workspace().releases.current() == first.key else first.key
    promote(instance, Workspace(), other, "it writes better")
    refits["release"] |= {"refit": True}
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(refits))
    assert run(instance, "released_adapter").success
    assert Workspace().releases.current() == other
    assert "released_adapter" not in [stage.name for stage, _ in stale_stages(instance, Workspace())]
