"""An upgrade trains nothing again: keys and hashes from before `auto` and later fields are still valid."""

import json
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import pytest
from commands import ft_dagster
from graphs import NO_TELEMETRY
from machines import remember_machine
from pydantic import ValidationError

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Lora, Recipe
from ft_dagster.config.recipe_file import load_recipe, recipe_of_adapter, resolve_recipe
from ft_dagster.config.recipe_part import Part
from ft_dagster.config.settings import load_settings
from ft_dagster.corpus.index import scan_reports
from ft_dagster.defs.stages import BASE_MODEL, LORA_ADAPTER, REPORT_FILES, STAGES, all_materializations, stale_among
from ft_dagster.defs.workspace import Workspace
from ft_dagster.evaluation.request import evaluation_key, measured_by
from ft_dagster.model.manifest import read_manifest
from ft_dagster.store.shared import open_store
from ft_dagster.training.find_or_train import made_before
from ft_dagster.training.request import KIND, _has_shape, training_key

ARCHIVES = sorted((Path(__file__).parent / "data").glob("history-*.tar.xz"))
"""Workspaces of an earlier version with their history and base; data/README.md says how they were made."""


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def annual(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace that an earlier version brought up to date, with its history."""
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME", "FT_STORE", "FT_THREADS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FT_WORKSPACE", str(tmp_path / "annual"))
    monkeypatch.setenv("FT_RECIPE", "recipe.yaml")
    monkeypatch.setenv("FT_CACHE", str(remember_machine(tmp_path / "cache")))
    return tmp_path / "annual"


def test_nothing_made_by_an_earlier_version_is_stale(annual: Path) -> None:
    settings = load_settings()
    there = Path(read_manifest(annual / "fine_tuned_model").recipe["base"]["model"])  # its earlier place
    recipe = load_recipe("recipe.yaml", annual)
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": str(there)})})
    with dg.DagsterInstance.local_temp(str(annual / ".dagster"), overrides=NO_TELEMETRY) as instance:
        made = all_materializations(instance)
    version = scan_reports(annual, settings.index, remember=False).version
    now = {REPORT_FILES: version, BASE_MODEL: made[BASE_MODEL].tags["dagster/data_version"]}  # type: ignore[index]
    assert stale_among(made, Workspace(), recipe, now) == []


def test_a_run_in_another_place_reuses_the_adapter(annual: Path) -> None:
    store, before = annual / ".ft" / "store", read_manifest(annual / "fine_tuned_model")
    kinds = (KIND, "adapter_evaluation", "tokenized_dataset")
    made = {kind: sorted(path.name for path in (store / kind).iterdir()) for kind in kinds}
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert {kind: sorted(path.name for path in (store / kind).iterdir()) for kind in kinds} == made
    assert read_manifest(annual / "fine_tuned_model") == before
    assert not (annual / "logs").exists(), "a training or an evaluation writes one there"


def test_a_training_finished_but_not_stored_before_the_upgrade_is_not_repeated(annual: Path) -> None:
    manifest = read_manifest(annual / "fine_tuned_model")
    stored = annual / ".ft" / "store" / KIND / manifest.key
    attempt = annual / ".ft" / "attempts" / manifest.key / "ended"
    attempt.mkdir(parents=True)
    result = open_store(load_settings()).get(KIND, manifest.key).about
    stored.rename(attempt / "adapter")
    (attempt / "adapter" / "artifact.json").unlink()
    (attempt / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "made_for"}))
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert read_manifest(stored) == manifest and not attempt.parent.exists()
    assert {path.name.partition("-")[0] for path in (annual / "logs").iterdir()} <= {"evaluation"}, "none of a training"


def test_an_edit_of_held_out_text_after_the_upgrade_reuses_the_adapter(annual: Path) -> None:
    manifest = read_manifest(annual / "fine_tuned_model")
    edited = next(path for path in (annual / "chapter_markdowns").iterdir() if path.stem in manifest.held_out)
    edited.write_text(edited.read_text() + "\nA sentence that no adapter has seen.\n")
    done = ft_dagster("run")
    assert done.returncode == 0, done.stderr
    assert {path.name.partition("-")[0] for path in (annual / "logs").iterdir()} == {"evaluation"}, "none of a training"
    assert read_manifest(annual / "fine_tuned_model") == manifest


def test_an_adapter_in_bfloat16_is_found_for_auto_but_not_vice_versa(annual: Path) -> None:
    settings = load_settings()
    recipe = load_recipe("recipe.yaml", annual)
    manifest = read_manifest(annual / "fine_tuned_model")
    identity = prepare_base(recipe.base, settings.cache).identity
    store = open_store(settings)
    assert recipe.base.dtype == "auto"
    (dataset,) = [found for found in store.all("tokenized_dataset") if found.about["version"] == manifest.dataset]
    for dtype, same in (("auto", True), ("bfloat16", True), ("float32", False)):
        found = made_before(store, dataset, identity, recipe.computing_in(dtype))
        assert (found is not None and found.key == manifest.key) == same
        assert (training_key(manifest.dataset, identity, recipe.computing_in(dtype)) == manifest.key) == (
            dtype == "bfloat16"
        )
    assert training_key(manifest.dataset, identity, recipe) != manifest.key, "so that a switch to bfloat16 is seen"


def test_switching_from_auto_to_a_format_is_a_change_but_from_bfloat16_back_is_not() -> None:
    auto = resolve_recipe({"name": "mine", "base": {"source": "embedded", "model": "m"}})
    hashes = {name: LORA_ADAPTER.recipe_hash(auto.computing_in(name)) for name in ("bfloat16", "float32")}
    accepted = [LORA_ADAPTER.recipe_hash(reading) for reading in auto.readings]
    assert hashes["bfloat16"] in accepted and hashes["float32"] not in accepted
    assert auto.computing_in("bfloat16").readings == (auto.computing_in("bfloat16"),)
    assert LORA_ADAPTER.recipe_hash(auto) not in hashes.values()


class Before(Part):
    kept: int = 1


class After(Part):
    LATER: ClassVar = ("new", "newer")
    REMOVED: ClassVar = {"gone": "old default"}

    kept: int = 1
    new: int = 2
    newer: tuple[int, ...] = ()


def test_keys_have_new_fields_only_if_changed_and_removed_fields_with_old_defaults() -> None:
    assert Before().for_keys() == {"kept": 1}
    assert After().for_keys() == {"kept": 1, "gone": "old default"}
    assert After(new=3).for_keys() == {"kept": 1, "new": 3, "gone": "old default"}
    assert After(newer=(1,)).for_keys(exclude=("gone",)) == {"kept": 1, "newer": [1]}
    assert After(new=3).for_keys(include=("new",)) == {"new": 3}


FIELDS = {
    "base": {"source", "model", "revision", "quantization", "dtype"},
    "corpus": {"unreadable", "secrets", "drafts", "bibliographies", "review_blocks", "minimum_score"},
    "tokens": {"block_length", "held_out"},
    "objectives": {"text", "rewrite"},
    "lora": {"rank", "alpha", "dropout", "targets", "rslora", "dora"},
    "training": {
        *("start", "replay", "epochs", "learning_rate", "schedule", "warmup", "rows_per_device", "rows_per_step"),
        *("processes", "strategy", "mixed_precision", "optimizer", "weight_decay", "gradient_clip", "neftune"),
        *("gradient_checkpointing", "attention", "fused", "save_every", "evaluate_every", "patience", "seed"),
    },
    "evaluation": {"prompts", "sample_tokens", "general", "chat", "train_tokens"},
    "release": {"minimum_gain", "confidence", "worst_loss", "general_loss", "chat_loss", "recited", "other_base"},
}
"""The fields of a recipe when adapters were first made by it. This list never changes."""


def test_every_field_added_since_counts_only_if_it_differs_from_its_default() -> None:
    for name, fields in FIELDS.items():
        part = Recipe.model_fields[name].annotation
        assert isinstance(part, type) and issubclass(part, Part)
        assert set(part.model_fields) - fields <= set(part.LATER), f"add the new field of {name} to LATER"


@pytest.mark.parametrize("name", FIELDS)
def test_a_new_field_leaves_the_keys_of_every_stage(name: str) -> None:
    recipe = resolve_recipe({"name": "mine", "base": {"source": "embedded", "model": "m"}})
    part = getattr(recipe, name)

    class Later(type(part)):  # type: ignore[misc]
        LATER: ClassVar = (*part.LATER, "later")

        later: int = 0

    upgraded = recipe.model_copy(update={name: Later(**part.model_dump())})

    def keys(of: Recipe) -> list[str]:
        return [
            *(stage.recipe_hash(of) for stage in STAGES),
            *(str(getattr(of, part).for_keys()) for part in ("corpus", "tokens")),
            training_key("text", {}, of),
            evaluation_key("adapter", "dataset", None, of, "float32", {}),
            measured_by("held out", {}, of, {}),
        ]

    assert keys(upgraded) == keys(recipe)
    changed = recipe.model_copy(update={name: Later(**part.model_dump(), later=8)})
    assert keys(changed) != keys(recipe)


def test_a_recipe_may_still_contain_the_default_of_a_removed_field() -> None:
    assert After.model_validate({"gone": "old default", "new": 3}) == After(new=3)
    with pytest.raises(ValidationError, match="gone is not old default"):
        After.model_validate({"gone": "another"})


def test_an_adapter_made_with_a_removed_field_is_readable_but_cannot_be_continued() -> None:
    content: dict[str, Any] = {"name": "before", "base": {"source": "embedded", "model": "m"}}
    made_by = content | {"lora": {"rank": 4, "init": "pissa"}}
    assert recipe_of_adapter(made_by) == resolve_recipe(content | {"lora": {"rank": 4}})
    assert _has_shape({"rank": 4, "init": "default"}, Lora(rank=4))
    assert not _has_shape({"rank": 4, "init": "pissa"}, Lora(rank=4))


def test_the_shipped_recipes_leave_the_number_format_to_the_machine() -> None:
    recipes: list[Recipe] = [load_recipe(name) for name in ("smollm2-135m", "mistral-7b-qlora")]
    assert [recipe.base.dtype for recipe in recipes] == ["auto", "auto"]
