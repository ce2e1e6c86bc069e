"""The counts that the benchmarks use are right."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.pages import with_section
from ft_dagster.base.model_folder import model_config
from ft_dagster.training.sizing.model_flops import causal_pairs, flops_of_pieces, training_flops
from ft_dagster.training.sizing.shape import shape_of

RANK = 4


def counted_by_torch(base: Path, length: int) -> int:
    """Return the operations of the products that torch counts in one training step on one row."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def test_model_flops_are_those_of_the_products_that_torch_computes(tiny_base: Path) -> None:
    shape, length = shape_of(model_config(tiny_base)), 24
    everywhere = length * length  # eager attention computes all pairs and masks some
    assert training_flops(shape, length, length, everywhere, RANK) == counted_by_torch(tiny_base, length)


def test_packed_pieces_cost_less_attention_than_one_long_piece(tiny_base: Path) -> None:
    shape = shape_of(model_config(tiny_base))
    whole = flops_of_pieces(shape, {32: 1}, 31, RANK)
    halves = flops_of_pieces(shape, {16: 2}, 31, RANK)
    pairs = causal_pairs(32) - 2 * causal_pairs(16)
    assert whole - halves == 12 * pairs * shape.layers * shape.heads * shape.head_dim


def test_results_of_another_machine_stay_on_the_page() -> None:
    first = with_section("# Title", "", "A", "old\n\n### report\n\ntable")
    both = with_section("# Title", first, "B", "stays")
    assert both == "# Title\n\n## A\n\nold\n\n### report\n\ntable\n\n## B\n\nstays\n"
    assert with_section("# Title", both, "A", "new") == "# Title\n\n## A\n\nnew\n\n## B\n\nstays\n"
