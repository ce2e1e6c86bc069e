"""With `release.refit`, what is released was trained on all text, after an adapter that was not had passed the gate."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from graphs import NO_TELEMETRY, instance_on, run

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


class Recipe:
    """The recipe file of a workspace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def change(self, **parts: dict[str, Any]) -> None:
        content = yaml.safe_load(self.path.read_text())
        for name, fields in parts.items():
            content[name] = content.get(name, {}) | fields
        self.path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def refitted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a workspace whose adapter in use was refitted, and the `home` of the instance."""
    folder = tmp_path_factory.mktemp("refitted")
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, folder / part, symlinks=True)
    content = yaml.safe_load((folder / "workspace" / "recipe.yaml").read_text())
    content["release"] |= {"refit": True}
    (folder / "workspace" / "recipe.yaml").write_text(yaml.safe_dump(content))
    with instance_on(folder / "workspace", folder / "home", folder / "cache") as instance:
        assert run(instance).success
    return folder


@pytest.fixture
def refits(workspace: Path) -> Recipe:
    """Return the recipe of the workspace, to be changed and written."""
    return Recipe(workspace / "recipe.yaml")


@pytest.fixture
def up_to_date(refitted: Path, workspace: Path, tmp_path: Path, refits: Recipe) -> Iterator[dg.DagsterInstance]:
    """Return the instance of a copy of that workspace."""
    shutil.copytree(refitted / "workspace", workspace, dirs_exist_ok=True, symlinks=True)
    shutil.copytree(refitted / "home", tmp_path / "home")
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=NO_TELEMETRY) as instance:
        yield instance


def released(workspace: Path) -> Any:
    return read_manifest(workspace / "fine_tuned_model")


def adapters() -> set[str]:
    return set(Workspace().store.keys(LORA_ADAPTER.name))


def test_the_released_adapter_has_learned_every_section_and_names_the_one_that_was_measured(
    up_to_date: dg.DagsterInstance, workspace: Path
) -> None:
    manifest, store = released(workspace), Workspace().store
    measured = read_manifest(store.get(LORA_ADAPTER.name, manifest.refit_of).path)
    assert measured.held_out == ["chapter_6"] and manifest.held_out == [] and measured.refit_of == ""
    assert {item["chapter"] for item in manifest.trained_on} == manifest.chapters.keys()
    assert {item["chapter"] for item in measured.trained_on} == manifest.chapters.keys() - {"chapter_6"}
    assert summarize(up_to_date, load_settings())["never_trained_on"] == []
    entry = Workspace().releases.history()[-1]
    assert entry["measured"] == measured.key and "trained again on all text" in entry["why"]["reason"]
    tokens = [store.get(TOKENIZED_DATASET.name, m.made_from[TOKENIZED_DATASET.name]) for m in (measured, manifest)]
    before, after = (found.about["splits"] for found in tokens)
    assert after["train"]["tokens"] == before["train"]["tokens"] + before["held_out"]["tokens"]
    evaluation = store.newest("adapter_evaluation", adapter=manifest.refit_of)
    assert evaluation is not None
    card = model_card(manifest, evaluation.about)
    assert f"Measured on `{manifest.refit_of}`" in card and "evaluated on 0 chapters" not in card
    assert stale_stages(up_to_date, Workspace()) == [] and make_plan(up_to_date, Workspace()).nothing_to_do


def test_the_next_adapter_is_compared_with_the_measured_one_and_clean_keeps_it(
    up_to_date: dg.DagsterInstance, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = released(workspace)
    edit(workspace)
    assert run(up_to_date).success
    evaluation = next(e for e in Workspace().store.all("adapter_evaluation") if e.about.get("in_use"))
    assert evaluation.about["in_use"] == first.refit_of
    assert "do not count" not in evaluation.about["verdict"]["reason"], "no held-out text was learned"
    monkeypatch.setenv("FT_KEEP_ADAPTERS", "1")
    assert {first.refit_of, first.key} <= set(find_removable(up_to_date, Workspace()).kept_adapters)
    promote(up_to_date, Workspace(), evaluation.about["adapter"], "to see it used")
    assert Workspace().releases.measured() == evaluation.about["adapter"]
    roll_back(up_to_date, Workspace(), first.key, "the sentence is wrong")
    assert Workspace().releases.current() == first.key and Workspace().releases.measured() == first.refit_of
    assert {first.key, first.refit_of} <= Workspace().releases.proven()


def edit(workspace: Path) -> None:
    """Add a sentence to a chapter that is trained on."""
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:
        chapter.write("\nOne more sentence on what the committee read.\n")


def test_where_the_refit_forgets_the_measured_adapter_is_released_with_the_reason(
    up_to_date: dg.DagsterInstance, workspace: Path, refits: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = find_or_evaluate.judge_refit

    def strict(models: Any, options: Any, missing: Any) -> Any:
        return judge(models, options.model_copy(update={"general_loss": -50.0}), missing)

    monkeypatch.setattr(find_or_evaluate, "judge_refit", strict)
    refits.change(evaluation={"general": "shipped"}, release={"general_loss": 50.0})
    assert run(up_to_date).success
    manifest = released(workspace)
    assert manifest.refit_of == "" and manifest.held_out
    entry = Workspace().releases.history()[-1]
    assert "it was not trained again on all text for release" in entry["why"]["reason"]
    assert "loss on general text" in entry["why"]["reason"]
    assert len(adapters()) == 2 and stale_stages(up_to_date, Workspace()) == []


def test_a_refit_is_made_again_from_what_lineage_restores(
    up_to_date: dg.DagsterInstance, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = released(workspace)
    restore(Workspace().store, manifest, tmp_path / "again")
    monkeypatch.setenv("FT_WORKSPACE", str(tmp_path / "again"))
    with dg.DagsterInstance.ephemeral() as other:
        assert make_plan(other, Workspace()).refit is not None
        assert run(other).success
    again = read_manifest(tmp_path / "again" / "fine_tuned_model")
    assert (again.key, again.files) == (manifest.key, manifest.files)


def test_switching_the_field_changes_only_the_release(
    up_to_date: dg.DagsterInstance, workspace: Path, refits: Recipe
) -> None:
    refit, evaluations = released(workspace), set(Workspace().store.keys("adapter_evaluation"))
    for on, key in ((False, refit.refit_of), (True, refit.key)):
        refits.change(release={"refit": on})
        stale = [(stage.name, reason.kind) for stage, reason in stale_stages(up_to_date, Workspace())]
        assert stale == [("released_adapter", "recipe")]
        plan = make_plan(up_to_date, Workspace())
        assert not plan.trains and (plan.refit is not None) == on
        assert run(up_to_date).success
        assert released(workspace).key == key and adapters() == {refit.key, refit.refit_of}
    assert set(Workspace().store.keys("adapter_evaluation")) == evaluations


def test_early_stopping_lets_the_refit_train_for_as_long_as_the_kept_weights(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["training"] |= {"evaluate_every": 2, "patience": 2}
    recipe = resolve_recipe(tiny_recipe)
    measured: Any = SimpleNamespace(about={"kept_step": 4, "planned_steps": 12})
    training = recipe_for_refit(recipe, measured, measured).training
    assert (training.evaluate_every, training.patience, training.epochs) == (None, None, 1.0)
    tiny_recipe["training"] |= {"evaluate_every": None, "patience": None}
    assert recipe_for_refit(resolve_recipe(tiny_recipe), measured, measured).training.epochs == 3


def test_a_refit_in_use_outlives_the_loss_of_the_store(up_to_date: dg.DagsterInstance, workspace: Path) -> None:
    before = released(workspace)
    shutil.rmtree(workspace / ".ft" / "store")
    assert run(up_to_date).success
    assert released(workspace) == before and Workspace().releases.measured() == before.refit_of
    assert stale_stages(up_to_date, Workspace()) == []


def test_a_refit_that_a_person_took_out_of_use_does_not_come_back(
    up_to_date: dg.DagsterInstance, workspace: Path, refits: Recipe
) -> None:
    refit = released(workspace)
    promote(up_to_date, Workspace(), refit.refit_of, "the refit says too much")
    refits.change(evaluation={"train_tokens": 2048})
    assert run(up_to_date).success
    assert Workspace().releases.current() == refit.refit_of
    assert stale_stages(up_to_date, Workspace()) == []


def test_what_a_person_put_in_use_stays_when_refitting_is_switched_on(
    up_to_date: dg.DagsterInstance, workspace: Path, refits: Recipe
) -> None:
    refits.change(release={"refit": False})
    first = released(workspace)
    edit(workspace)
    assert run(up_to_date).success
    promote(up_to_date, Workspace(), first.key, "it writes better")
    (third,) = adapters() - {first.key, first.refit_of}
    promote(up_to_date, Workspace(), first.refit_of, "or rather this one")
    assert third != first.refit_of
    refits.change(release={"refit": True})
    assert run(up_to_date, "released_adapter").success
    assert Workspace().releases.current() == first.refit_of
    assert "released_adapter" not in [stage.name for stage, _ in stale_stages(up_to_date, Workspace())]
