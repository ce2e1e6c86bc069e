"""Pieces of a row never see each other: packed where a model keeps them apart, in padded rows elsewhere."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PACKED, PADDED, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.dataset.packing import LEAK
from ft_dagster.errors import TrainingError
from ft_dagster.model.layout import padded_rows
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import collate

RECIPE = resolve_recipe({"name": "tiny", "base": {"source": "folder", "model": "/tiny", "dtype": "float32"}})
PIECES = [[(7 * place + 11 * number) % 500 + 3 for place in range(length)] for number, length in enumerate((40, 3, 50))]


def batch(*rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return a batch of rows, each of which consists of pieces."""
    return collate(
        [
            {
                "input_ids": [token for piece in pieces for token in piece],
                "lengths": [len(piece) for piece in pieces],
                "prompts": [1] * len(pieces),
                "objectives": [0] * len(pieces),
            }
            for pieces in rows
        ],
        2,
    )


@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_the_losses_of_each_piece_are_those_that_it_has_alone(family: str) -> None:
    packed = PackedModel(tiny_model(family), RECIPE)
    assert packed.layout == ("packed" if family in PACKED else "padded")
    assert (packed.leak > LEAK) == (family in PADDED) and packed.probe() <= LEAK
    together, _ = packed.nats_and_hits(batch(PIECES, PIECES[1:]))
    alone = [packed.nats_and_hits(batch([piece]))[0][0] for piece in PIECES]
    torch.testing.assert_close(together[0], torch.cat(alone), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, :53], torch.cat(alone[1:]), atol=2e-4, rtol=1e-4)


def test_the_documentation_lists_what_was_tried() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    for rows, families in (("packed", PACKED), ("padded", PADDED)):
        assert f"| {rows} | {', '.join(sorted(families))} |" in page
    assert f"transformers {'.'.join(version('transformers').split('.')[:2])}" in page


def test_padded_rows_have_the_gradients_of_pieces_alone() -> None:
    model = tiny_model("opt")
    packed = PackedModel(model, RECIPE)
    weights = model.get_input_embeddings().weight
    packed.summed_nats(batch(PIECES, PIECES[1:])).backward()
    together, weights.grad = weights.grad, None
    for piece in (*PIECES, *PIECES[1:]):
        packed.summed_nats(batch([piece])).backward()
    torch.testing.assert_close(together, weights.grad, atol=1e-3, rtol=1e-3)


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero_in_padded_rows() -> None:
    loss = PackedModel(tiny_model("opt"), RECIPE).summed_nats(batch([[5], [7]]))
    loss.backward()
    assert loss.item() == 0.0


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_padded_rows_have_every_token_once_and_are_no_larger_than_the_batch(lengths: list[list[int]]) -> None:
    found = batch(*([list(range(10, 10 + length)) for length in row] for row in lengths))
    ids = found["input_ids"].flatten()
    seen: list[int] = []
    for inputs, index in padded_rows(found["position_ids"], found["input_ids"]):
        inside = inputs["attention_mask"].bool()
        assert (index >= 0).equal(inside) and inputs["input_ids"].numel() <= ids.numel()
        assert inputs["input_ids"][inside].equal(ids[index[inside]])
        assert (index[:, 1:][inside[:, 1:]] == index[:, :-1][inside[:, 1:]] + 1).all(), "a row is one piece"
        seen += index[inside].tolist()
    assert sorted(seen) == list(range(len(ids)))


def test_the_probe_leaves_random_state_and_mode_as_they_were() -> None:
    model = tiny_model("opt").train()
    before = torch.get_rng_state()
    PackedModel(model, RECIPE)
    assert model.training and torch.get_rng_state().equal(before)


@pytest.fixture
def base_of(tiny_base: Path, tmp_path: Path) -> Any:
    """`base_of(family)`: the recipe and the prepared base of a tiny model in a folder."""

    def make(family: str, **lora: Any) -> tuple[Recipe, Any]:
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        for path in tiny_base.glob("*token*"):
            shutil.copy(path, folder)
        content = {"name": "x", "base": {"source": "folder", "model": str(folder), "dtype": "float32"}, "lora": lora}
        recipe = resolve_recipe(content)
        return recipe, prepare_base(recipe.base, tmp_path)

    return make


def test_a_model_without_fused_attention_is_loaded_with_the_plain_one(base_of: Any) -> None:
    recipe, base = base_of("gpt_neo")
    assert recipe.training.attention == "sdpa"
    assert load_base(base, recipe, None).config._attn_implementation == "eager"


def test_all_linear_layers_of_mamba_are_those_that_an_adapter_has_an_effect_on(base_of: Any) -> None:
    recipe, base = base_of("mamba")
    tuned = add_adapter(load_base(base, recipe, None), base, recipe)
    names = {name.split(".")[-4] for name, _ in tuned.named_parameters() if "lora_A" in name}
    assert names == {"in_proj", "x_proj", "dt_proj"}


@pytest.mark.parametrize(
    ("family", "target", "said"),
    [
        ("mamba", "out_proj", r"names 'out_proj', whose weights .* Name others: dt_proj, in_proj, x_proj"),
        ("gpt2", "c_atn", r"no linear layer 'c_atn' \(did you mean c_attn\?\). It has c_attn, c_fc, c_proj"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_by_name(base_of: Any, family: str, target: str, said: str) -> None:
    recipe, base = base_of(family, targets=[target])
    with pytest.raises(TrainingError, match=said):
        add_adapter(load_base(base, recipe, None), base, recipe)


def test_the_layers_of_gpt2_can_be_named_as_targets(base_of: Any) -> None:
    recipe, base = base_of("gpt2", targets=["c_attn"])
    tuned = add_adapter(load_base(base, recipe, None), base, recipe)
    assert json.dumps(sorted(n for n, _ in tuned.named_parameters() if "lora_A" in n)).count("c_attn") == 2
