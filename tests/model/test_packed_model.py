"""The fused layers and the chunked loss match transformers and torch, and pieces do not attend to each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ft_dagster.base.prepare import prepare_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import resolve_recipe
from ft_dagster.model.fused.packed_attention import Pieces, attend, attend_backward
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.loss import nats_and_hits, summed_nats
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import collate

ROWS = [
    {"input_ids": list(range(3, 43)), "lengths": [10, 1, 29], "prompts": [1, 1, 1]},
    {"input_ids": list(range(60, 95)), "lengths": [35], "prompts": [1]},
    {"input_ids": list(range(200, 238)), "lengths": [19, 19], "prompts": [1, 1]},
]


@pytest.fixture
def packed(tiny_base: Path, tiny_recipe: dict[str, Any]) -> Callable[..., PackedModel]:
    """Return a function that builds a model with a nonzero adapter and the same weights every time."""

    def build(
        dtype: str = "float32", training: dict[str, Any] | None = None, targets: Any = "all-linear", dropout: float = 0
    ) -> PackedModel:
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, config)
        shake(tuned, "default")
        return PackedModel(tuned.train(), recipe(tiny_recipe, dtype, training or {}))

    return build


def recipe(tiny_recipe: dict[str, Any], dtype: str, training: dict[str, Any]) -> Recipe:
    base = tiny_recipe["base"] | {"dtype": dtype}
    return resolve_recipe(tiny_recipe | {"base": base, "training": tiny_recipe["training"] | training})


def shake(model: PeftModel, adapter: str) -> None:
    torch.manual_seed(len(adapter))
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data.normal_(0, 0.05)


def gradients(packed: PackedModel, *batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum over batches, as in an optimizer step with accumulation."""
    packed.model.zero_grad()
    for rows in batches:
        packed.summed_nats(collate(rows, 2)).backward()
    return {name: p.grad.clone() for name, p in packed.model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference over the parameters."""
    assert ours.keys() == theirs.keys() and ours
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_layers_have_the_loss_and_the_gradients_of_transformers(
    packed: Callable[..., PackedModel], targets: Any, recompute: bool
) -> None:
    fused = packed(targets=targets, training={"gradient_checkpointing": recompute})
    stock = packed(targets=targets, training={"fused": False})
    assert fused.not_fused is None and stock.not_fused == "training.fused is false"
    batch = collate(ROWS, 2)
    assert fused.summed_nats(batch).item() == pytest.approx(stock.summed_nats(batch).item(), rel=1e-5)
    assert largest_difference(gradients(fused, ROWS), gradients(stock, ROWS)) < 1e-4


def test_in_bfloat16_fused_layers_are_as_close_to_float32_as_those_of_transformers(
    packed: Callable[..., PackedModel],
) -> None:
    exact = gradients(packed(), ROWS)
    ours = largest_difference(gradients(packed("bfloat16"), ROWS), exact)
    theirs = largest_difference(gradients(packed("bfloat16", {"fused": False}), ROWS), exact)
    assert ours < 1.5 * theirs < 0.2


@pytest.mark.parametrize("training", [{"fused": True}, {"fused": False}, {"fused": False, "attention": "eager"}])
def test_a_piece_in_a_packed_row_is_processed_as_if_it_were_alone(
    packed: Callable[..., PackedModel], training: dict[str, Any]
) -> None:
    model = packed(training=training)
    together = model.nats_and_hits(collate(ROWS, 2))[0]
    for index, row in enumerate(ROWS):
        start = 0
        for length in row["lengths"]:
            piece = {"input_ids": row["input_ids"][start : start + length], "lengths": [length], "prompts": [1]}
            alone = model.nats_and_hits(collate([piece], 2))[0][0]
            assert torch.allclose(together[index, start : start + length], alone, atol=1e-4)
            start += length


@pytest.mark.parametrize(
    ("quantization", "dtype", "attention"),
    [
        ("nf4", "bfloat16", "sdpa"),
        ("nf4", "bfloat16", "eager"),
        ("nf4", "float32", "sdpa"),
        ("none", "bfloat16", "sdpa"),
    ],
)
def test_in_low_precision_and_4_bit_a_packed_piece_is_processed_as_if_it_were_alone(
    tiny_recipe: dict[str, Any], tmp_path: Path, quantization: str, dtype: str, attention: str
) -> None:
    base = tiny_recipe["base"] | {"quantization": quantization, "dtype": dtype}
    asked = resolve_recipe(tiny_recipe | {"base": base, "training": tiny_recipe["training"] | {"attention": attention}})
    prepared = prepare_base(asked.base, tmp_path)
    model = PackedModel(add_adapter(load_base(prepared, asked, tmp_path), prepared, asked).eval(), asked)
    together = model.nats_and_hits(collate(ROWS, 2))[0]
    tolerance = 0.1 if dtype == "bfloat16" else 1e-4  # 8 bits of mantissa: 1/256 of nats around 6, two or three times
    for index, row in enumerate(ROWS):
        start = 0
        for length in row["lengths"]:
            piece = {"input_ids": row["input_ids"][start : start + length], "lengths": [length], "prompts": [1]}
            alone = model.nats_and_hits(collate([piece], 2))[0][0]
            assert torch.allclose(together[index, start : start + length], alone, atol=tolerance)
            start += length


@pytest.mark.parametrize("fused", [True, False])
def test_however_rows_are_batched_and_padded_the_gradients_are_the_same(
    packed: Callable[..., PackedModel], fused: bool
) -> None:
    model = packed(training={"fused": fused})
    at_once = gradients(model, ROWS)
    assert largest_difference(gradients(model, ROWS[:1], ROWS[1:]), at_once) < 1e-4
    assert largest_difference(gradients(model, *([row] for row in ROWS)), at_once) < 1e-4
    pieces = []
    for row in ROWS:
        start = 0
        for length in row["lengths"]:
            pieces.append({"input_ids": row["input_ids"][start : start + length], "lengths": [length], "prompts": [1]})
            start += length
    assert largest_difference(gradients(model, pieces), at_once) < 1e-4  # one piece per row, padded to the longest


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_however_rows_are_distributed_to_threads_the_gradients_are_the_same(
    packed: Callable[..., PackedModel], threads: int
) -> None:
    before = torch.get_num_threads()
    model = packed()
    expected = gradients(packed(training={"fused": False}), ROWS)
    torch.set_num_threads(threads)
    try:
        ours = gradients(model, ROWS)
        assert torch.get_num_threads() == threads
        assert all(torch.equal(weight, ours[name]) for name, weight in gradients(model, ROWS).items())
    finally:
        torch.set_num_threads(before)
    assert largest_difference(ours, expected) < 1e-4


@pytest.mark.parametrize("lengths", [[300], [129, 1, 128, 257]])
def test_attention_in_blocks_equals_attention_over_the_whole_piece(lengths: list[int]) -> None:
    torch.manual_seed(0)
    heads, key_heads, size = 4, 2, 8
    pieces = Pieces(lengths, torch.empty(0), torch.empty(0), heads, key_heads, size**-0.5)
    q, k, v = (torch.randn(sum(lengths), h, size, requires_grad=True) for h in (heads, key_heads, key_heads))
    whole = [
        functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in piece), is_causal=True, enable_gqa=True)
        for piece in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    expected = torch.cat([piece.transpose(0, 1).flatten(1) for piece in whole])
    ours, probabilities = attend(q.detach(), k.detach(), v.detach(), pieces)
    assert torch.allclose(ours, expected, atol=1e-6)
    gradient = torch.randn(expected.shape)
    outs = tuple(torch.empty_like(x) for x in (q, k, v))
    attend_backward(gradient, q.detach(), k.detach(), v.detach(), probabilities, pieces, outs)
    for found, wanted in zip(outs, torch.autograd.grad(expected, (q, k, v), gradient), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_is_the_sum_over_tokens_each_with_its_weight(packed: Callable[..., PackedModel], fused: bool) -> None:
    model = packed(training={"fused": fused})
    batch = collate(ROWS, 2)
    nats, _ = model.nats_and_hits(batch)
    assert ((nats != 0) == (batch["labels"] != -100)).all()
    assert model.summed_nats(batch).item() == pytest.approx(nats.sum().item(), rel=1e-5)
    weights = torch.rand(batch["labels"].shape)
    weighted = model.summed_nats(batch | {"weights": weights}).item()
    assert weighted == pytest.approx((nats * weights).sum().item(), rel=1e-5)


def test_a_disabled_or_replaced_adapter_is_not_computed(packed: Callable[..., PackedModel]) -> None:
    model = packed()
    model.model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(model.model, "other")
    fused = PackedModel(model.model, recipe_of(model))
    batch = collate(ROWS, 2)
    seen = {}
    for name in ("default", "other"):
        model.model.set_adapter(name)
        seen[name] = fused.summed_nats(batch).item()
        with torch.no_grad():
            logits = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        expected = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        assert seen[name] == pytest.approx(expected.item(), rel=1e-5)
    with model.model.disable_adapter():
        seen["base"] = fused.summed_nats(batch).item()
    assert len({round(value, 3) for value in seen.values()}) == 3


def recipe_of(model: PackedModel) -> Recipe:
    return resolve_recipe({"name": "tiny", "base": {"source": "folder", "model": "unused", "dtype": "float32"}})


def test_the_reason_is_given_if_fused_layers_do_not_apply(packed: Callable[..., PackedModel]) -> None:
    assert "dropout" in str(packed(dropout=0.1).not_fused)
    model = packed(training={"fused": False})
    model.base.model.layers[0].self_attn.config.sliding_window = 8
    assert "sliding window" in str(PackedModel(model.model, recipe_of(model)).not_fused)


@pytest.mark.parametrize("tokens", [1, 511, 512, 1200])
def test_the_chunked_loss_has_the_value_and_the_gradient_of_cross_entropy(tokens: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, 16, requires_grad=True), torch.randn(50, 16)
    targets, weights = torch.randint(50, (tokens,)), torch.rand(tokens)
    each = functional.cross_entropy(hidden @ head.t(), targets, reduction="none")
    assert torch.allclose(nats_and_hits(hidden.detach(), head, targets)[0], each, atol=1e-5)
    for given in (None, weights):
        plain = (each if given is None else each * given).sum()
        ours = summed_nats(hidden, head, targets, given)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
        (expected,) = torch.autograd.grad(plain / 7, hidden, retain_graph=True)
        (gradient,) = torch.autograd.grad(ours / 7, hidden)
        assert torch.allclose(gradient, expected, atol=1e-5)
