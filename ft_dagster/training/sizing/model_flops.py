"""Count the operations that training an adapter on a frozen model needs at least, from which speed limits follow.

A product of (m, k) with (k, n) is 2 m k n operations. Only products count. Elementwise operations (norms, rotary
embedding, softmax, activation) and the optimizer do not, as in the usual model FLOPs (PaLM, arXiv 2204.02311).

For a token, with N weights in linear layers and the output head:

- forward: 2 N;
- backward to the activations: 2 N. Frozen weights need no gradient of their own, which would be another 2 N. The
  first layer's q, k and v read the embedding, which is frozen, too, so that it gets no gradient;
- LoRA of rank r, on every linear layer (in, out): 2 r (in + out) forward, the same backward to the activations, and
  the same again for the gradients of its own two matrices;
- attention, for each pair of a query and a key that it attends to: scores and values, 2 x 2 x heads x head size
  forward, and twice that backward (to queries, keys, probabilities and values). Attention is causal: a piece of L
  tokens has L (L + 1) / 2 pairs. Pieces packed in a row do not attend to each other.

Recomputed activations (gradient checkpointing) and padding cost time but are not necessary, so they do not count.
"""

from collections.abc import Mapping

from ft_dagster.training.sizing.shape import Shape

READ_THE_EMBEDDING = ("q_proj", "k_proj", "v_proj")
"""Linear layers of the first decoder layer that read the embedding."""


def causal_pairs(length: int) -> int:
    """Return the number of pairs of a query and a key in a piece of `length` tokens.

    >>> causal_pairs(4)
    10
    """
    return length * (length + 1) // 2


def training_flops(shape: Shape, tokens: int, predicted: int, pairs: int, rank: int) -> int:
    """Return the number of operations of one forward and backward pass.

    Args:
        shape: the shape of the model.
        tokens: the number of tokens without padding.
        predicted: the number of tokens with a loss; the output head is needed only for them.
        pairs: the number of pairs of a query and a key in all pieces; see `causal_pairs`.
        rank: the rank of LoRA.
    """
    attention = 6 * 2 * pairs * shape.heads * shape.head_dim
    per_token = sum(4 * inputs * outputs + 6 * rank * (inputs + outputs) for inputs, outputs in shape.linear.values())
    to_embedding = sum(2 * shape.hidden * (shape.linear[name][1] + rank) for name in READ_THE_EMBEDDING)
    head = 4 * predicted * shape.hidden * shape.vocabulary
    return tokens * (shape.layers * per_token - to_embedding) + shape.layers * attention + head


def flops_of_pieces(shape: Shape, pieces: Mapping[int, int], predicted: int, rank: int) -> int:
    """Return the number of operations of training on pieces, given as length -> number of pieces of that length."""
    tokens = sum(length * count for length, count in pieces.items())
    pairs = sum(causal_pairs(length) * count for length, count in pieces.items())
    return training_flops(shape, tokens, predicted, pairs, rank)
