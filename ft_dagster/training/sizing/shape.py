"""The shape of a model, from its config.json. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of `model_type` that are supported: their layers have gated MLP, grouped-query attention and RMSNorm."""
_QUERY_BIAS = ("qwen2",)
"""Those whose query, key and value projections have a bias although the config does not say so."""


class UnknownModelError(Exception):
    """The formula does not support this model or layer; the message says which."""


@dataclass(frozen=True)
class Shape:
    """The values of a config.json that determine memory and operations."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output head shares the weights of the embedding."""
    attention_biases: int
    """The number of bias elements in a layer's attention."""
    head_norms: bool
    """Whether queries and keys are normalized by head."""
    of_llama: bool
    """Whether layers and output head are Llama's, for which this program has its own implementations."""

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The numbers of inputs and outputs of each linear layer in a decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """The number of weights in the linear layers of all decoder layers, to which quantization applies."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def other_parameters(self) -> int:
        """The number of other weights: embedding, output head, norms and biases."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (norms + self.attention_biases) + self.hidden


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a config.json describes.

    Raises:
        UnknownModelError: the model type is not supported, or a field is missing or not a number.
    """
    kind = config.get("model_type")
    if kind not in KNOWN:
        raise UnknownModelError(f"the memory formula supports {', '.join(KNOWN)}, not {kind!r}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        biased = kind in _QUERY_BIAS or bool(config.get("attention_bias"))
        output_bias = hidden if biased and kind not in _QUERY_BIAS else 0
        return Shape(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_biases=(heads + 2 * kv_heads) * head_dim + output_bias if biased else 0,
            head_norms=kind == "qwen3",
            of_llama=kind in ("llama", "mistral"),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnknownModelError(f"config.json does not describe the model's shape: {error!r}") from error
