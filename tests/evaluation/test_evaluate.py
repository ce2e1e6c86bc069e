"""The base and adapters are measured side by side."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Evaluation
from ft_dagster.config.recipe_file import RecipeError, load_recipe, resolve_recipe
from ft_dagster.evaluation import __main__ as evaluation
from ft_dagster.evaluation.eval_sets import EvalSet, load_eval_sets
from ft_dagster.evaluation.evaluate import evaluate
from ft_dagster.evaluation.request import EvaluationRequest, evaluation_key, measured_by
from ft_dagster.runtime.child import INTERRUPTED
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train


@pytest.fixture
def dataset(make_dataset: Callable[..., Path], prose: Callable[[int, int], str]) -> Path:
    texts = {f"chapter_{n}": prose(n, 3 + n) for n in range(5)} | {"chapter_short": "Ω."}
    return make_dataset(texts, held_out=["chapter_3", "chapter_4", "chapter_short"])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_new_and_released_adapter_are_measured_side_by_side(
    dataset: Path, tiny_recipe: dict[str, Any], tmp_path: Path, quantization: str
) -> None:
    content = tiny_recipe | {"base": tiny_recipe["base"] | {"quantization": quantization}}
    recipe = resolve_recipe(content)
    base = prepare_base(recipe.base, tmp_path / "cache")

    def adapter(name: str, epochs: int) -> str:
        longer = resolve_recipe(content | {"training": content["training"] | {"epochs": epochs}})
        request = TrainingRequest(
            key=name,
            base=base.to_json(),
            dataset=str(dataset),
            recipe=longer.model_dump(mode="json"),
            attempt=str(tmp_path / name),
            logs=str(tmp_path / "logs"),
            locks=str(tmp_path / "locks"),
        )
        train(request, lambda _: None)
        return str(tmp_path / name / "adapter")

    result = evaluate(
        EvaluationRequest(
            base=base.to_json(),
            dataset=str(dataset),
            recipe=recipe.model_dump(mode="json"),
            adapters={"released": adapter("short", 1), "new": adapter("long", 6)},
            known={},
            output=str(tmp_path / "evaluation"),
            offload=str(tmp_path / "offload"),
            locks=str(tmp_path / "locks"),
        )
    )
    scores = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    assert scores["new"] < scores["released"] < scores["base"]
    assert all(set(m["chapters"]) == {"chapter_3", "chapter_4", "chapter_short"} for m in result["models"].values())
    assert result["models"]["base"]["samples"][0]["prompt"] == "The committee"
    assert result == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())


def test_an_evaluation_is_made_again_when_what_is_compared_changes(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = resolve_recipe(tiny_recipe)
    key = evaluation_key("new", "dataset", None, recipe, "bfloat16", {})
    assert key == evaluation_key("new", "dataset", None, recipe, "bfloat16", {})
    assert key != evaluation_key("new", "dataset", "released", recipe, "bfloat16", {})
    assert key != evaluation_key("other", "dataset", None, recipe, "bfloat16", {})
    asked_more = resolve_recipe(tiny_recipe | {"release": {"minimum_gain": 1, "minimum_held_out": 0}})
    assert key != evaluation_key("new", "dataset", None, asked_more, "bfloat16", {})
    texts = {"general": EvalSet("general", {"a.md": "One."}, tmp_path)}
    others = {"general": EvalSet("general", {"a.md": "Two."}, tmp_path)}
    moved = {"general": EvalSet("general", {"a.md": "One."}, tmp_path / "elsewhere")}
    keys = [
        evaluation_key("new", "dataset", None, recipe, "bfloat16", eval_sets) for eval_sets in (texts, others, moved)
    ]
    assert len({key, *keys}) == 3 and keys[0] == keys[2]


def test_measurements_in_different_number_formats_are_never_mixed_up(tiny_recipe: dict[str, Any]) -> None:
    auto, named = resolve_recipe(tiny_recipe), resolve_recipe(tiny_recipe).computing_in("bfloat16")
    keys = {dtype: evaluation_key("new", "dataset", None, auto, dtype, {}) for dtype in ("bfloat16", "float32")}
    assert keys["bfloat16"] != keys["float32"]
    assert keys["bfloat16"] == evaluation_key("new", "dataset", None, named, "bfloat16", {}), "as before there was auto"
    measured = [measured_by("held out", {}, auto.computing_in(dtype), {}) for dtype in keys]
    assert len(set(measured)) == 2


def test_shipped_texts_that_do_not_fit_the_base_are_left_out_and_others_are_refused(
    trained: Callable[..., TrainingRequest], tmp_path: Path
) -> None:
    request = trained()
    assert request.recipe["tokens"]["block_length"] == 64, "shorter than most of the conversations that ship"
    (chat,) = load_eval_sets(Evaluation(general=None), tmp_path, instruct=True).values()
    asked = EvaluationRequest(
        base=request.base,
        dataset=request.dataset,
        recipe=request.recipe,
        adapters={"new": str(Path(request.attempt) / "adapter")},
        known={},
        output=str(tmp_path / "evaluation"),
        offload=str(tmp_path / "offload"),
        locks=request.locks,
        texts={"chat": {"files": {"a.json": "no conversation"}, "folder": str(chat.folder)}},
    )
    assert "chat" not in evaluate(asked)["models"]["new"]
    with pytest.raises(RecipeError, match="not a conversation"):
        evaluate(replace(asked, texts={"chat": {"files": {"a.json": "none"}, "folder": str(tmp_path)}}))


def test_a_device_is_leased_before_a_library_looks_at_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Path] = []

    @contextmanager
    def leased(locks: Path) -> Iterator[None]:
        held.append(locks)
        yield
        held.clear()

    def import_quickly(module: str) -> None:
        assert held == [tmp_path / "locks"]
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "leased", leased)
    monkeypatch.setattr(evaluation, "import_quickly", import_quickly)
    recipe = load_recipe("smollm2-135m").model_dump(mode="json")
    places = {name: str(tmp_path / name) for name in ("dataset", "output", "offload", "locks")}
    request = EvaluationRequest(base={}, recipe=recipe, adapters={}, known={}, **places)
    assert evaluation.main(request.write(tmp_path / "request.json")) == INTERRUPTED
