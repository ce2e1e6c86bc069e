"""An adapter records which base it belongs to, and is loaded on no other."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ft_dagster import __version__
from ft_dagster.base.model_folder import BaseModelError, PreparedBase
from ft_dagster.base.prepare import base_version, prepare_base
from ft_dagster.config.recipe import Base, Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.config.settings import Settings
from ft_dagster.model.adapter import load_adapter
from ft_dagster.model.load import load_base
from ft_dagster.model.manifest import AdapterError, check_adapter, differences, made_on, read_manifest, write_manifest
from ft_dagster.store.hashing import file_digest
from ft_dagster.training.request import CODE_VERSION, TrainingRequest
from ft_dagster.training.train import train


@pytest.fixture
def request_(request_for: Callable[..., TrainingRequest]) -> TrainingRequest:
    return request_for(training={"epochs": 1})


@pytest.fixture
def adapter(request_: TrainingRequest) -> Path:
    """Return the folder of a trained adapter."""
    train(request_, lambda _: None)
    return Path(request_.attempt) / "adapter"


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[PreparedBase, Recipe]]:
    """Return a function that copies the tiny base into a folder with one change and makes a recipe for it."""

    def copy(change: Callable[[Path], Any]) -> tuple[PreparedBase, Recipe]:
        folder = tmp_path / "other"
        shutil.copytree(tiny_base, folder)
        change(folder)
        recipe = resolve_recipe({"name": "other", "base": {"source": "folder", "model": str(folder)}})
        return prepare_base(recipe.base, tmp_path / "cache"), recipe

    return copy


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def test_the_manifest_says_what_an_adapter_was_made_from(request_: TrainingRequest, adapter: Path) -> None:
    manifest = read_manifest(adapter)
    base = request_.prepared_base()
    assert manifest.key == request_.key
    assert manifest.base == {
        "name": base.name,
        "weights": base.weights,
        "tokenizer": base.tokenizer,
        "template": base.template,
    }
    assert manifest.revision == base_version(Base(**request_.recipe["base"]))
    assert manifest.recipe == request_.recipe
    assert manifest.dataset == request_.lineage["dataset"]
    assert (manifest.code, manifest.package) == (CODE_VERSION, __version__)
    assert manifest.libraries["torch"] == version("torch")
    assert manifest.libraries.keys() >= {"python", "transformers", "peft", "bitsandbytes"}
    assert manifest.step == json.loads((Path(request_.attempt) / "result.json").read_text())["steps"]
    assert manifest.files == {
        path.name: file_digest(path) for path in adapter.iterdir() if path.name != "manifest.json"
    }
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= manifest.files.keys()


def test_the_manifest_has_the_commit_of_a_hub_base_as_its_revision(adapter: Path, request_: TrainingRequest) -> None:
    base = {"source": "hub", "model": "a/b", "revision": "0" * 40}
    recipe = resolve_recipe({"name": "hub", "base": base}).model_dump(mode="json")
    write_manifest(adapter, "key", request_.prepared_base(), recipe, "1", 1, {})
    assert read_manifest(adapter).revision == "0" * 40


def test_an_adapter_loads_on_its_base_under_any_name(
    request_: TrainingRequest, adapter: Path, other_base: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path
) -> None:
    base, recipe = other_base(lambda _: None)
    assert base.name != request_.prepared_base().name
    model = load_adapter(load_base(base, recipe, tmp_path / "offload"), adapter, base, "first")
    model = load_adapter(model, adapter, base, "second")
    assert set(model.peft_config) == {"first", "second"} and model.active_adapter == "first"
    trained = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert model.get_parameter(f"{name}.first.weight").equal(trained[f"{name}.weight"])


def test_after_a_move_the_base_of_the_workspace_is_used_if_the_adapter_fits(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(adapter)
    moved = replace(manifest, recipe={**manifest.recipe, "base": manifest.recipe["base"] | {"model": "/nowhere/tiny"}})
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"name": "m", "base": {"source": "folder", "model": "bases/tiny"}})
    )
    settings = Settings(workspace=tmp_path, recipe="recipe.yaml", cache=tmp_path / "cache")
    with pytest.raises(BaseModelError, match="/nowhere/tiny"):
        made_on(moved, settings)
    base = tmp_path / "bases" / "tiny"
    shutil.copytree(tiny_base, base)
    recipe, found = made_on(moved, settings)
    assert found.folder == recipe.base.model == str(base)
    config = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="/nowhere/tiny"):
        made_on(moved, settings)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (other_weights, "other weights"),
        (other_tokenizer, "another tokenizer"),
        (other_template, "another chat template"),
    ],
)
def test_an_adapter_is_refused_on_another_base_of_the_same_shape_that_peft_accepts(
    request_: TrainingRequest,
    adapter: Path,
    other_base: Callable[..., tuple[PreparedBase, Recipe]],
    change: Callable[[Path], Any],
    phrase: str,
    tmp_path: Path,
) -> None:
    base, recipe = other_base(change)
    assert isinstance(PeftModel.from_pretrained(load_base(base, recipe, tmp_path), str(adapter)), PeftModel)
    with pytest.raises(AdapterError) as caught:
        load_adapter(load_base(base, recipe, tmp_path), adapter, base)
    mine = request_.prepared_base()
    assert str(caught.value).startswith(f"The adapter in {adapter} was trained on {mine.name}, which has {phrase} (")
    assert str(caught.value).endswith(
        "than other. Load it on the base model it was trained on, or train one for this base."
    )
    assert len(differences(read_manifest(adapter), base)) == 1


def test_a_model_loaded_from_another_folder_than_the_stated_base_is_refused(
    request_: TrainingRequest, adapter: Path, other_base: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path
) -> None:
    base, recipe = other_base(other_weights)
    with pytest.raises(AdapterError, match=r"was loaded from .*other, not from"):
        load_adapter(load_base(base, recipe, tmp_path), adapter, request_.prepared_base())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_with_a_damaged_or_missing_file_is_refused_by_the_files_name(
    request_: TrainingRequest, adapter: Path, name: str
) -> None:
    base = request_.prepared_base()
    data = (adapter / name).read_bytes()
    (adapter / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AdapterError, match=rf"{name} is not the file that was saved"):
        check_adapter(adapter, base)
    (adapter / name).unlink()
    with pytest.raises(AdapterError, match=rf"{name} is missing"):
        check_adapter(adapter, base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json, so nothing says which base model it belongs to"),
        ("{", r"manifest.json is damaged \(Expecting property name"),
        ("[]", "manifest.json is damaged"),
        ('{"key": "k", "recipe": {}, "code": "1", "libraries": {}}', "manifest.json is damaged .*'base'"),
        (
            '{"key": "k", "recipe": {}, "code": "1", "libraries": {}, "base": {"tokenizer": "t", "template": 3}}',
            r"manifest.json is damaged \(base has no weights and no template\)",
        ),
    ],
)
def test_an_adapter_without_a_complete_manifest_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        read_manifest(tmp_path)


def test_known_fields_of_an_earlier_or_later_manifest_version_are_read(adapter: Path) -> None:
    path = adapter / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("revision", "package", "step", "started_from", "chapters", "files"):
        del content[name]
    path.write_text(json.dumps(content | {"from the future": 1}))
    assert read_manifest(adapter).files == {}


def test_training_continues_only_an_adapter_of_its_base_and_the_manifest_names_it(
    request_: TrainingRequest, adapter: Path, other_base: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path
) -> None:
    again = replace(request_, key="again", attempt=str(tmp_path / "again"), start=str(adapter))
    train(again, lambda _: None)
    assert read_manifest(Path(again.attempt) / "adapter").started_from == request_.key
    base, recipe = other_base(other_weights)
    elsewhere = replace(
        again, attempt=str(tmp_path / "elsewhere"), base=base.to_json(), recipe=recipe.model_dump(mode="json")
    )
    with pytest.raises(AdapterError, match="other weights"):
        train(elsewhere, lambda _: None)
