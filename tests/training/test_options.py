"""A recipe's options of LoRA: each does what its paper says and resumes exactly, or is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.errors import TrainingError
from ft_dagster.model.adapter import load_adapter
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.train import train

PROMPT = torch.arange(40, 72)[None]
Parts = dict[str, dict[str, Any]]


class KilledError(Exception):
    """Stands for a process that died."""


@pytest.fixture
def prepared(tiny_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[PreparedBase, Recipe]]:
    """Return the tiny base and a recipe for it in float32 with these parts changed."""

    def prepare(**parts: dict[str, Any]) -> tuple[PreparedBase, Recipe]:
        parts["base"] = {"dtype": "float32"} | parts.get("base", {})
        recipe = resolve_recipe(
            tiny_recipe | {name: tiny_recipe.get(name, {}) | fields for name, fields in parts.items()}
        )
        return prepare_base(recipe.base, tmp_path / "cache"), recipe

    return prepare


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits


def adapter_weights(request: TrainingRequest) -> dict[str, torch.Tensor]:
    return load_file(Path(request.attempt) / "adapter" / "adapter_model.safetensors")


# Without dropout, which the tiny recipe has, layers are fused where possible.
OPTIONS: dict[str, Parts] = {
    "rslora": {"lora": {"rslora": True, "alpha": 4, "dropout": 0.0}},
    "dora": {"lora": {"dora": True}},
    "dora-nf4": {"lora": {"dora": True}, "base": {"quantization": "nf4"}},
    "int8": {"base": {"quantization": "int8"}},
    "neftune": {"training": {"neftune": 5.0}, "lora": {"dropout": 0.0}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_with_every_option_learns_and_its_adapter_loads_on_the_base(
    request_for: Callable[..., TrainingRequest], name: str, tmp_path: Path
) -> None:
    request = request_for(**OPTIONS[name])
    result = train(request, lambda _: None)
    assert result["reloads"] and result["largest_logit_change"] > 0
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in adapter_weights(request).values())
    base, recipe = request.prepared_base(), request.resolved_recipe()
    untuned = logits(load_base(base, recipe, tmp_path))
    tuned = load_adapter(load_base(base, recipe, tmp_path), Path(request.attempt) / "adapter", base)
    assert not logits(tuned).equal(untuned)
    with tuned.disable_adapter():
        assert logits(tuned).equal(untuned)


@pytest.mark.parametrize("name", ["dora", "int8", "neftune"])
def test_with_every_option_a_resumed_training_gives_the_bytes_of_an_undisturbed_one(
    request_for: Callable[..., TrainingRequest], name: str
) -> None:
    def die(metrics: dict[str, Any]) -> None:
        if metrics.get("step") == 5:
            raise KilledError

    died, undisturbed = request_for("died", **OPTIONS[name]), request_for("undisturbed", **OPTIONS[name])
    with pytest.raises(KilledError):
        train(died, die)
    assert train(died, lambda _: None)["resumed_from"] == 4
    train(undisturbed, lambda _: None)
    assert adapter_weights(died).keys() == adapter_weights(undisturbed).keys()
    assert all(tensor.equal(adapter_weights(died)[name]) for name, tensor in adapter_weights(undisturbed).items())


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, 8 / 4),
        ({"rslora": True}, 8 / math.sqrt(4)),
    ],
)
def test_the_adapter_is_scaled_by_alpha_over_rank_or_with_rslora_its_root(
    prepared: Callable[..., tuple[PreparedBase, Recipe]], lora: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    base, recipe = prepared(lora={"rank": 4, "alpha": 8} | lora)
    model = add_adapter(load_base(base, recipe, tmp_path), base, recipe)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == pytest.approx(expected)


@pytest.mark.parametrize("fused", [True, False])
def test_neftune_adds_noise_during_training_and_none_afterwards(
    request_for: Callable[..., TrainingRequest], tmp_path: Path, fused: bool
) -> None:
    quiet, noise = {"fused": fused}, {"fused": fused, "neftune": 15.0}
    plain = request_for("plain", lora={"dropout": 0.0}, training=quiet)
    noisy = request_for("noisy", lora={"dropout": 0.0}, training=noise)
    first = [train(request, lambda _: None)["history"][0]["loss"] for request in (plain, noisy)]
    assert first[0] != first[1]
    base, recipe = noisy.prepared_base(), noisy.resolved_recipe()
    model = load_adapter(load_base(base, recipe, tmp_path), Path(noisy.attempt) / "adapter", base)
    assert logits(model).equal(logits(model))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "has no linear layer 'q_prj' (did you mean q_proj?). It has down_proj, gate_proj, k_proj, o_proj"),
        (["q_proj", "v_project"], "has no linear layer 'v_project' (did you mean v_proj?)"),
        (["lm_head"], "has no linear layer 'lm_head'"),
        (["embed_tokens"], "has no linear layer 'embed_tokens'"),
    ],
)
def test_a_layer_that_the_base_does_not_have_is_refused_with_the_nearest_name(
    prepared: Callable[..., tuple[PreparedBase, Recipe]], targets: list[str], message: str, tmp_path: Path
) -> None:
    base, recipe = prepared(lora={"targets": targets})
    with pytest.raises(TrainingError) as caught:
        add_adapter(load_base(base, recipe, tmp_path), base, recipe)
    assert str(caught.value).startswith(f"lora.targets of the recipe does not fit {base.name}, which {message}")


def test_a_layer_may_be_named_in_one_place_of_the_model(
    prepared: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path
) -> None:
    base, recipe = prepared(lora={"targets": ["layers.0.self_attn.q_proj", "gate_proj"]})
    model = add_adapter(load_base(base, recipe, tmp_path), base, recipe)
    tuned = {name.partition(".lora_A")[0] for name, weight in model.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.model.layers.") for name in tuned} == {
        "0.self_attn.q_proj",
        "0.mlp.gate_proj",
        "1.mlp.gate_proj",
    }


def test_float16_is_refused_on_a_cpu(
    prepared: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, recipe = prepared(base={"dtype": "float16"})
    with pytest.raises(TrainingError, match=r"base.dtype: float16 needs a GPU"):
        load_base(base, recipe, tmp_path)


def test_an_adapter_of_a_hub_base_names_the_repository_and_not_a_local_folder(
    prepared: Callable[..., tuple[PreparedBase, Recipe]], tmp_path: Path
) -> None:
    base, recipe = prepared()
    hub = recipe.base.model_copy(update={"source": "hub", "model": "owner/name", "revision": "0" * 40})
    on_hub = recipe.model_copy(update={"base": hub})
    config = add_adapter(load_base(base, on_hub, tmp_path), base, on_hub).peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("owner/name", "0" * 40)
