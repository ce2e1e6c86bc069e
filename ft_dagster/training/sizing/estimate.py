"""Estimate the memory of a training from the base's config.json and the recipe alone. Imports no torch.

The peak of a step consists of what is always in memory (frozen weights; adapter, gradients, optimizer), what the
forward pass keeps for the backward pass, and the largest temporary values: the loss over the vocabulary, or the
backward pass of one layer. docs/memory.md derives the coefficients and compares the results with published and measured
figures.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ft_dagster.config.recipe import Recipe
from ft_dagster.training.sizing.shape import Shape, UnknownModelError, shape_of


@dataclass(frozen=True)
class Held:
    """The bytes that a program needs for each kind of value. The defaults are this program's; others differ in them."""

    nf4_bits: float = 4 + 8 / 64 + 32 / (64 * 256)
    """Bits of a weight in NF4 with double quantization: 4 bits, an 8-bit scale for each block of 64, and a 32-bit scale
    for each 256 of those scales: 4.127 (QLoRA, arXiv 2305.14314, section 3). Without double quantization 4 + 32/64."""
    beside_quantized: float = 4
    """An unquantized weight of a quantized model, which peft's `prepare_model_for_kbit_training` casts to 32 bits."""
    adapter: float = 4
    """A LoRA weight. Its gradient takes as much."""
    linear_output: float = 4
    """An activation between NF4 layers: bitsandbytes returns the dtype of its input, which after a 32-bit norm is 32
    bits. Between other layers it is the recipe's `base.dtype`."""
    residual_beside_quantized: float = 4
    """An element of the residual stream of a quantized model, which starts at a 32-bit embedding."""
    logit: float = 14
    """An element of the logits at their peak, if the loss is computed for all of the batch at once: log-probabilities
    and two gradients in 32 bits, one in 16."""
    logits_at_once: int | None = 512
    """Tokens whose logits are in memory at once (model/loss.py). None if the loss is computed for all of the batch at
    once, as with models whose output head is not Llama's."""


THIS_PROGRAM = Held()
CUDA_CONTEXT = 700 * 2**20
"""Memory of a process on a GPU before its first tensor; 723 MiB in https://discuss.pytorch.org/t/73021."""
CPU_PROCESS = 950 * 2**20
"""Memory of a process on a CPU without tensors: 490 MiB for Python, torch, transformers, peft and datasets once they
are imported; the rest is for threads, tokenizer, rows and memory that runtime/allocator.py keeps (fitted to
benchmarks/results/memory.md)."""
CPU_SPARE = 1.15
"""Resident memory over the memory of tensors on a CPU, as the allocator keeps freed blocks (from the same table)."""
_OPTIMIZER = {"adamw_torch": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state for a LoRA weight: two moments, in 32 or in 8 bits."""
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training in bytes, by part."""

    frozen_weights: int
    adapter: int
    """LoRA weights, their gradients, and the state of the optimizer."""
    activations: int
    """Values that the forward pass keeps for the backward pass."""
    at_work: int
    """The loss over the vocabulary, or the backward pass of one layer, whichever needs more."""
    framework: int
    """The process without tensors, or on a GPU its CUDA context."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in asdict(self).items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def memory_estimate(
    config: Mapping[str, Any], recipe: Recipe, on_gpu: bool, held: Held = THIS_PROGRAM
) -> MemoryEstimate:
    """Estimate the peak memory of a training.

    Args:
        config: the content of the base's config.json.
        recipe: the recipe of the training.
        on_gpu: whether to estimate the memory of the GPU, or that of the process if it computes on a CPU.
        held: the bytes that the program needs for each kind of value; another program's to compare with its figures.

    Raises:
        UnknownModelError: the formula does not support the model, or a layer that the recipe names.
    """
    shape = shape_of(config)
    tokens = recipe.training.rows_per_device * recipe.tokens.block_length
    layer = tokens * _layer_bytes(shape, recipe, on_gpu, held)
    checkpointed = recipe.training.gradient_checkpointing
    residual = _WIDTH[recipe.base.dtype] if recipe.base.quantization == "none" else held.residual_beside_quantized
    loss = _loss_bytes(shape, recipe, tokens, held)
    on_its_way_back = _backward_bytes(shape, recipe, tokens, held) + (layer if checkpointed else 0)
    spare = 1.0 if on_gpu else CPU_SPARE
    return MemoryEstimate(
        frozen_weights=round(spare * _weight_bytes(shape, recipe, held)) + (0 if on_gpu else _mapped(config, recipe)),
        adapter=round(spare * _adapter_bytes(shape, recipe, held)),
        activations=round(spare * shape.layers * (tokens * shape.hidden * residual if checkpointed else layer)),
        at_work=round(spare * max(loss, on_its_way_back)),
        framework=CUDA_CONTEXT if on_gpu else CPU_PROCESS,
    )


def _weight_bytes(shape: Shape, recipe: Recipe, held: Held) -> float:
    width = _WIDTH[recipe.base.dtype]
    if recipe.base.quantization == "none":
        return width * (shape.linear_parameters + shape.other_parameters)
    others = held.beside_quantized * shape.other_parameters
    # Autocast keeps a copy of a 32-bit output head in its own dtype, if the head is called under autocast.
    copied = held.beside_quantized > width and not _in_chunks(shape, held)
    head = shape.vocabulary * shape.hidden * width if copied else 0
    if recipe.base.quantization == "nf4":
        return shape.linear_parameters * held.nf4_bits / 8 + others + head
    scales = 4 * shape.layers * sum(outputs for _, outputs in shape.linear.values())  # one scale for each output
    return shape.linear_parameters + scales + others + head


def _targets(shape: Shape, recipe: Recipe) -> list[tuple[int, int]]:
    if recipe.lora.targets == "all-linear":
        return list(shape.linear.values())
    names = {name.rpartition(".")[2] for name in recipe.lora.targets}
    if unknown := sorted(names - shape.linear.keys()):
        raise UnknownModelError(f"the memory formula does not know the layer(s) {', '.join(unknown)} of lora.targets")
    return [size for name, size in shape.linear.items() if name in names]


def _adapter_bytes(shape: Shape, recipe: Recipe, held: Held) -> float:
    weights = shape.layers * recipe.lora.rank * sum(map(sum, _targets(shape, recipe)))
    copy = _WIDTH[recipe.base.dtype] if _WIDTH[recipe.base.dtype] < held.adapter else 0  # made by autocast
    return weights * (2 * held.adapter + _OPTIMIZER[recipe.training.optimizer] + copy)


def _in_chunks(shape: Shape, held: Held) -> bool:
    return held.logits_at_once is not None and shape.of_llama


def _loss_bytes(shape: Shape, recipe: Recipe, tokens: int, held: Held) -> float:
    if not _in_chunks(shape, held):
        return tokens * shape.vocabulary * held.logit
    width = _WIDTH[recipe.base.dtype] if recipe.base.quantization == "none" else held.beside_quantized
    # Log-probabilities in 32 bits; with a shorter dtype also logits and their gradient; and the head input's gradient.
    logit = 4 if width == 4 else 2 * width + 4
    chunk = min(tokens, held.logits_at_once or tokens) * shape.vocabulary * logit
    return chunk + tokens * shape.hidden * width


def is_fused(shape: Shape, recipe: Recipe, on_gpu: bool) -> bool:
    """Whether model/fused/layer.py computes the layers, as far as config and recipe determine it."""
    plain = shape.of_llama and not (shape.attention_biases or recipe.lora.dropout or recipe.lora.dora)
    plain = plain and recipe.training.mixed_precision is None
    return recipe.training.fused and plain and not on_gpu and recipe.base.quantization == "none"


def _fused_layer_bytes(shape: Shape, recipe: Recipe) -> float:
    """Return the bytes that a fused layer keeps per token for its backward pass, in the recipe's dtype."""
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim  # rotated queries and keys, values, outputs
    probabilities = shape.heads * recipe.tokens.block_length // 2  # assuming documents that fill half a block
    adapters = recipe.lora.rank * len(_targets(shape, recipe))
    elements = 2 * shape.hidden + heads + probabilities + 3 * shape.intermediate + adapters
    return _WIDTH[recipe.base.dtype] * elements


def _layer_bytes(shape: Shape, recipe: Recipe, on_gpu: bool, held: Held) -> float:
    """Return the bytes that a decoder layer keeps per token for its backward pass.

    Frozen linear layers keep no inputs, but LoRA does.
    """
    if is_fused(shape, recipe, on_gpu):
        return _fused_layer_bytes(shape, recipe)
    width, length = _WIDTH[recipe.base.dtype], recipe.tokens.block_length
    targets = _targets(shape, recipe)
    norms = 2 * 4 * shape.hidden  # computed in 32 bits
    attention = 4 * width * shape.heads * shape.head_dim  # queries, outputs, and keys and values for every head
    if recipe.training.attention == "sdpa":
        attention += width * length  # the mask that keeps packed documents apart
    else:
        attention += (4 + width) * shape.heads * length  # the softmax in 32 bits, and rounded
    between = held.linear_output if recipe.base.quantization == "nf4" else width
    mlp = 3 * between * shape.intermediate  # gate, its activation, up
    lora = sum(width * (inputs + recipe.lora.rank) for inputs, _ in targets)
    if recipe.lora.dropout:
        lora += (1 if on_gpu else 4) * sum(inputs for inputs, _ in targets)  # the dropout mask
    return norms + attention + mlp + lora


def _backward_bytes(shape: Shape, recipe: Recipe, tokens: int, held: Held) -> float:
    """Return the bytes of a layer's backward pass: gradients of its MLP and, if quantized, one dequantized weight."""
    width = _WIDTH[recipe.base.dtype]
    quantized = recipe.base.quantization != "none"
    between = held.linear_output if recipe.base.quantization == "nf4" else width
    weight = max(inputs * outputs for inputs, outputs in shape.linear.values()) * width if quantized else 0
    return 3 * between * tokens * shape.intermediate + weight


def _mapped(config: Mapping[str, Any], recipe: Recipe) -> int:
    """Return the bytes of the weights' file on a CPU, which stays in memory unless the weights are used unconverted."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or recipe.base.dtype)
    if recipe.base.quantization == "none" and stored == recipe.base.dtype:
        return 0
    shape = shape_of(config)
    return _WIDTH.get(stored, 2) * (shape.linear_parameters + shape.other_parameters)
