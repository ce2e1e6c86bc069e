"""Estimate how long a training takes on a machine that has not trained yet: operations over the rate of its products.

The estimate should be right within a factor of two; after the first training its measured speed is used instead.
Imports no torch.
"""

from ft_dagster.config.recipe import Recipe
from ft_dagster.runtime.machine import cores
from ft_dagster.runtime.number_format import ProductRates
from ft_dagster.training.sizing.estimate import is_fused
from ft_dagster.training.sizing.model_flops import training_flops
from ft_dagster.training.sizing.shape import Shape

_FUSED = 0.55
"""Share of the rate of products that fused layers reach: 0.44 to 0.52 in bfloat16, 0.66 in float32, on three reports
(benchmarks/results/training.md)."""
_PLAIN = 0.25
"""The same for transformers' own layers on a CPU: 0.14 to 0.18 in bfloat16, 0.29 in float32 (same table)."""
_ON_GPU = 0.33
"""The same on a GPU, unquantized: derived from a count of operations and bytes, not measured."""
_QUANTIZED = 0.6
"""Factor of these shares if weights are dequantized for each product: counted, not measured."""
_RECOMPUTED = 0.75
"""Factor of these shares if the backward pass recomputes the forward pass: 3 parts of 4."""


def estimated_seconds(
    shape: Shape, recipe: Recipe, rates: ProductRates, tokens: float, threads: int | None
) -> float | None:
    """Return the seconds of forward and backward passes on `tokens`, or None if the machine lacks the number format.

    Args:
        shape: the shape of the base.
        recipe: the recipe, with its number format decided.
        rates: the machine's rates of matrix products.
        tokens: the number of tokens in all epochs.
        threads: the number of CPU threads; None for all cores.
    """
    per_second = rates.rates.get(recipe.compute_dtype, 0.0)
    if not per_second:
        return None
    if not rates.on_gpu:
        per_second *= (threads or cores()) / recipe.training.processes
    pairs = tokens * (recipe.tokens.block_length / 2 + 1) / 2  # assuming pieces that fill half a block
    flops = training_flops(shape, round(tokens), round(tokens), round(pairs), recipe.lora.rank)
    fused = is_fused(shape, recipe, rates.on_gpu)
    share = _ON_GPU if rates.on_gpu else _FUSED if fused else _PLAIN
    if recipe.base.quantization != "none":
        share *= _QUANTIZED
    if recipe.training.gradient_checkpointing:
        share *= _RECOMPUTED
    return flops / (per_second * share * recipe.training.processes)
