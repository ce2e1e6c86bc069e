"""How long a training takes on a machine that has not trained yet: operations over the rate of its products.

Imports no torch. Meant to be right within a factor of two; after the first training its measured speed counts.
"""

from ft_dagster.config.recipe import Recipe
from ft_dagster.runtime.machine import cores
from ft_dagster.runtime.number_format import ProductRates
from ft_dagster.training.sizing.estimate import is_fused
from ft_dagster.training.sizing.model_flops import training_flops
from ft_dagster.training.sizing.shape import Shape

_FUSED = 0.55
"""Share of the rate of products that fused layers reach: 0.44 to 0.52 in bfloat16 and 0.66 in float32, on three reports
(benchmarks/results/training.md)."""
_PLAIN = 0.25
"""The same of transformers' own layers on a CPU: 0.14 to 0.18 in bfloat16, 0.29 in float32 (same table)."""
_ON_GPU = 0.33
"""The same on a GPU, unquantized: from a count of operations and bytes; not measured."""
_QUANTIZED = 0.6
"""What is left of these where weights are dequantized for each product; counted, not measured."""
_RECOMPUTED = 0.75
"""What is left where the backward pass computes the forward pass again: 3 parts of 4."""


def estimated_seconds(
    shape: Shape, recipe: Recipe, rates: ProductRates, tokens: float, threads: int | None
) -> float | None:
    """Seconds of forward and backward passes on so many tokens; None where the machine lacks the number format.

    Args:
        shape: of the base.
        recipe: with its number format decided.
        rates: of the machine.
        tokens: of all epochs.
        threads: of the CPU; None for all cores.
    """
    per_second = rates.rates.get(recipe.compute_dtype, 0.0)
    if not per_second:
        return None
    if not rates.on_gpu:
        per_second *= (threads or cores()) / recipe.training.processes
    pairs = tokens * (recipe.tokens.block_length / 2 + 1) / 2  # of pieces that fill half a block
    flops = training_flops(shape, round(tokens), round(tokens), round(pairs), recipe.lora.rank)
    fused = is_fused(shape, recipe, rates.on_gpu)
    share = _ON_GPU if rates.on_gpu else _FUSED if fused else _PLAIN
    if recipe.base.quantization != "none":
        share *= _QUANTIZED
    if recipe.training.gradient_checkpointing:
        share *= _RECOMPUTED
    return flops / (per_second * share * recipe.training.processes)
