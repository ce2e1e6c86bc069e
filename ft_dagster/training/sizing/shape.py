"""The sizes of a model, from its config.json. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of `model_type` whose layers are those counted here: gated MLP, grouped-query attention, RMSNorm."""
_QUERY_BIAS = ("qwen2",)
"""Of these, the ones whose query, key and value projections have a bias although the config does not say so."""


class UnknownModelError(Exception):
    """The formula does not know this model or layer; the message says which."""


@dataclass(frozen=True)
class Shape:
    """What of a config.json decides memory."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    attention_biases: int
    """Elements of the biases of a layer's attention."""
    head_norms: bool
    """Whether queries and keys are normalised by head."""
    of_llama: bool
    """Whether layers and output head are Llama's, which this program computes in its own ways."""

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a decoder layer."""
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
        """Weights of all decoder layers' linear layers: what quantization applies to."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def other_parameters(self) -> int:
        """Embedding, output head, norms and biases."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (norms + self.attention_biases) + self.hidden


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UnknownModelError: the model is of another type, or a field is missing or is not a number.
    """
    kind = config.get("model_type")
    if kind not in KNOWN:
        raise UnknownModelError(f"the memory formula knows {', '.join(KNOWN)}, not {kind!r}")
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
        raise UnknownModelError(f"config.json does not say the model's shape: {error!r}") from error
