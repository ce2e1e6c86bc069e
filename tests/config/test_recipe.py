"""A recipe says what to train and how, and invalid fields are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import DEFAULT_RECIPE, RecipeError, load_recipe, resolve_recipe, shipped_recipes
from ft_dagster.defs.stages import LORA_ADAPTER, STAGES

EMBEDDED = {"source": "embedded", "model": "smollm2-135m-instruct"}


def refused(**fields: Any) -> str:
    """Return the error message for a recipe with these fields."""
    with pytest.raises(RecipeError) as caught:
        resolve_recipe({"name": "mine", "base": EMBEDDED, **fields}, origin="mine.yaml")
    return str(caught.value)


def parts() -> dict[str, type[BaseModel]]:
    """Return the class of each part of a recipe by name."""
    annotations = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in annotations.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def test_the_shipped_recipes_load_under_their_own_name() -> None:
    assert shipped_recipes() == ["mistral-7b-qlora", "smollm2-135m"]
    assert [load_recipe(name).name for name in shipped_recipes()] == shipped_recipes()
    assert DEFAULT_RECIPE in shipped_recipes()


def test_the_original_job_is_a_pinned_4_bit_mistral() -> None:
    base = load_recipe("mistral-7b-qlora").base
    assert (base.model, base.quantization) == ("mistralai/Mistral-7B-Instruct-v0.2", "nf4")
    assert base.revision is not None
    assert len(base.revision) == 40


def test_a_resolved_recipe_has_a_value_in_every_field_and_resolves_to_itself() -> None:
    recipe = resolve_recipe({"name": "mine", "base": EMBEDDED, "lora": {"rank": 8}})
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.tokens.block_length) == (8, 32, 512)
    assert resolve_recipe(recipe.model_dump(mode="json")) == recipe


def test_parts_are_plain_data_with_every_field_and_no_other_part() -> None:
    recipe = resolve_recipe({"name": "mine", "base": EMBEDDED, "tokens": {"held_out": 0.25}})
    assert recipe.part("tokens", "base") == {
        "tokens": {"block_length": 512, "held_out": 0.25},
        "base": {
            "source": "embedded",
            "model": "smollm2-135m-instruct",
            "revision": None,
            "quantization": "none",
            "dtype": "auto",
        },
    }


@pytest.mark.parametrize(
    ("objectives", "taught"),
    [({}, ["text"]), ({"rewrite": 0.5}, ["text", "rewrite"]), ({"text": 0, "rewrite": 2}, ["rewrite"])],
)
def test_objectives_with_a_weight_are_taught(objectives: dict[str, float], taught: list[str]) -> None:
    recipe = resolve_recipe({"name": "mine", "base": EMBEDDED, "objectives": objectives})
    assert recipe.part("objectives.taught") == {"objectives.taught": taught}


def test_the_name_of_a_recipe_is_in_no_part() -> None:
    one, two = (resolve_recipe({"name": name, "base": EMBEDDED}) for name in ("one", "two"))
    assert one.part(*parts()) == two.part(*parts())


def test_a_recipe_file_is_found_in_the_workspace_or_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "base": EMBEDDED}), "utf-8")
    assert load_recipe("mine.yaml", tmp_path) == load_recipe(str(path)) == load_recipe(str(path), Path("/elsewhere"))


def test_a_moved_workspace_with_its_base_has_the_same_hashes(tmp_path: Path) -> None:
    recipes = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "recipe.yaml").write_text("{name: mine, base: {source: folder, model: bases/tiny}}")
        recipes.append(load_recipe("recipe.yaml", tmp_path / place))
    here, there = recipes
    assert there.base.model == str(tmp_path / "there" / "bases" / "tiny")
    assert [stage.recipe_hash(here) for stage in STAGES] == [stage.recipe_hash(there) for stage in STAGES]
    absolute = resolve_recipe(here.model_dump(mode="json"))
    assert LORA_ADAPTER.recipe_hash(absolute) in {LORA_ADAPTER.recipe_hash(reading) for reading in here.readings}


def test_a_number_in_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbase: {source: embedded, model: m}\ntraining: {learning_rate: 2e-4}\n"
    )
    assert load_recipe("mine.yaml", tmp_path).training.learning_rate == 0.0002


def test_a_missing_recipe_names_the_path_and_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml", tmp_path)
    assert str(caught.value) == (
        f"There is no recipe 'mine.yaml': No such file or directory ({tmp_path / 'mine.yaml'}). "
        "Shipped recipes: mistral-7b-qlora, smollm2-135m; or set FT_RECIPE to a YAML file."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora: [1", "The recipe mine.yaml is not YAML: while parsing a flow sequence"),
        (b"name: \xff\xfe", "The recipe mine.yaml is not UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
        (b"", "The recipe mine.yaml must be a mapping with the fields name, base, corpus"),
        (b"- name", "The recipe mine.yaml must be a mapping with the fields name, base, corpus"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml", tmp_path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": {"learning_rte": 1}}, "training.learning_rte is not a field of a recipe (did you mean learning_"),
        ({"trainning": {}}, "trainning is not a field of a recipe (did you mean training?)"),
        ({"lora": {"use_dora": True}}, "lora.use_dora is not a field of a recipe (did you mean dora?)"),
        ({"lora": {"learning_rate": 1}}, "lora.learning_rate is not a field of a recipe (did you mean training.learn"),
        ({"epochs": 3}, "epochs is not a field of a recipe (did you mean training.epochs?)"),
        ({"tokens": {"zzz": 1}}, "tokens.zzz is not a field of a recipe (known here: block_length, held_out)"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(fields: dict[str, Any], message: str) -> None:
    assert message in refused(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"training": {"rows_per_step": 6, "rows_per_device": 4}},
            "training.rows_per_step (6) must be a multiple of training.rows_per_device (4).",
        ),
        (
            {"training": {"rows_per_step": 4, "rows_per_device": 2, "processes": 3}},
            "training.rows_per_step (4) must be a multiple of training.rows_per_device (2) times training.processes "
            "(3).",
        ),
        (
            {"training": {"strategy": "fsdp"}},
            "training.strategy: fsdp shares the base among training.processes, which is 1; set ddp.",
        ),
        (
            {"training": {"strategy": "fsdp", "processes": 2, "evaluate_every": 5}},
            "training.evaluate_every does not go with training.strategy: fsdp, where no process has a whole model to "
            "measure; set ddp or leave it out.",
        ),
        (
            {"training": {"strategy": "fsdp", "processes": 2}, "base": {**EMBEDDED, "quantization": "int8"}},
            "training.strategy: fsdp does not go with base.quantization: int8; set nf4, none or ddp.",
        ),
        (
            {"training": {"mixed_precision": "bf16"}},
            "training.mixed_precision (bf16) needs base.dtype: float32; with auto products are computed in that "
            "already.",
        ),
        (
            {"base": {"source": "hub", "model": "a/b"}},
            "base.revision is needed with base.source: hub, as the full commit hash of the repository "
            "(a branch such as main would let the base change under its adapters).",
        ),
        ({"base": {"source": "embedded"}}, "base.model: Field required."),
        ({"tokens": {"held_out": 1.0}}, "tokens.held_out: Input should be less than 1."),
        ({"tokens": {"block_length": 8}}, "tokens.block_length: Input should be greater than or equal to 16."),
        (
            {"base": {**EMBEDDED, "quantization": "nf5"}},
            "base.quantization: Input should be 'none', 'nf4' or 'int8', not 'nf5' (did you mean nf4?).",
        ),
        (
            {"training": {"schedule": "cosin"}},
            "training.schedule: Input should be 'cosine', 'linear' or 'constant', not 'cosin' (did you mean cosine?).",
        ),
        (
            {"base": {**EMBEDDED, "dtype": 16}},
            "base.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', not 16.",
        ),
        (
            {"lora": {"targets": "all_linear"}},
            "lora.targets: 'all_linear' is neither all-linear nor a list of layer names such as [q_proj, v_proj].",
        ),
        (
            {"lora": {"targets": []}},
            "lora.targets: [] is neither all-linear nor a list of layer names such as [q_proj, v_proj].",
        ),
        (
            {"training": {"patience": 2}},
            "training.patience (2) needs training.evaluate_every, the optimizer steps between measurements that it "
            "counts.",
        ),
        (
            {"lora": {"dora": True}, "base": {**EMBEDDED, "quantization": "int8"}},
            "lora.dora does not go with base.quantization: int8 (peft loses the scales of 8-bit weights on a CPU); "
            "set nf4 or none.",
        ),
        (
            {"lora": {"init": "pissa"}},
            "lora.init was removed, and what 'default' did is done always: leave the line out.",
        ),
        ({"objectives": {"rewrite": -1}}, "objectives.rewrite: Input should be greater than or equal to 0."),
        (
            {"objectives": {"text": 0}},
            "objectives.text and objectives.rewrite are both 0, so that nothing would be taught; leave them out to "
            "teach text.",
        ),
        ({"lora": {1: 2}}, "lora.1: Keys should be strings."),
        ({"lora": None}, "lora: Input should be a valid dictionary or instance of Lora."),
    ],
)
def test_a_field_with_an_invalid_value_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    assert refused(**fields) == f"The recipe mine.yaml cannot be used: {message}"


def test_every_problem_is_named_at_once() -> None:
    message = refused(lora={"rank": 0}, training={"epochs": 0})
    assert message == (
        "The recipe mine.yaml cannot be used: lora.rank: Input should be greater than or equal to 1; "
        "training.epochs: Input should be greater than 0."
    )


def test_a_recipe_cannot_be_changed_after_it_was_resolved() -> None:
    recipe = resolve_recipe({"name": "mine", "base": EMBEDDED})
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora.rank = 3
