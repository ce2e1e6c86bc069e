"""A causal language model for training and evaluation, which maps packed rows to negative log-likelihoods."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ft_dagster.config.recipe import Recipe
from ft_dagster.dataset.packing import LEAK, PACKED, PADDED
from ft_dagster.model.fused.layer import cannot_fuse
from ft_dagster.model.fused.model import FusedModel, Share, count_shares
from ft_dagster.model.fused.packed_attention import Pieces
from ft_dagster.model.layout import largest_leak, padded_rows
from ft_dagster.model.loss import nats_and_hits, summed_nats
from ft_dagster.model.products import decided
from ft_dagster.model.rows import IGNORED

log = logging.getLogger(__name__)
_PLAIN_HEADS = ("llama", "mistral")
"""Architectures whose logits are exactly the product with the output head."""


class PackedModel:
    """Computes losses of packed rows with the fastest implementation that the model allows."""

    def __init__(self, model: PeftModel | PreTrainedModel, recipe: Recipe) -> None:
        """Choose the implementation for a model with its adapters.

        Args:
            model: a base model, with or without adapters. It stays usable on its own, and shares its weights.
            recipe: the recipe, which sets the number format of matrix products, and whether to use fused layers.
        """
        recipe = decided(recipe)
        self.model = model
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.dtype = getattr(torch, recipe.compute_dtype)
        head = self.base.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        self._head_is_plain = plain and self.base.config.model_type in _PLAIN_HEADS
        self.not_fused = self._reason(recipe)
        """Why fused layers are not used; None if they are."""
        self._fused: FusedModel | None = None
        if self.not_fused is None:
            recompute = recipe.training.gradient_checkpointing
            self._fused = FusedModel(self.base.model.layers, self.base.model.norm, recompute)
        self.layout = PACKED
        """PADDED if pieces of a packed row would see each other."""
        self.leak = self.probe()
        if self.leak > LEAK:
            self.layout = PADDED
        log.info("Layers: %s", f"those of transformers ({self.not_fused})" if self.not_fused else "fused")
        log.info("Rows: %s (pieces change each other's losses by %.3f nats a token)", self.layout, self.leak)

    @torch.no_grad()
    def probe(self) -> float:
        """Return how much pieces of a packed row change each other's losses, in nats a token."""
        training = self.model.training
        self.model.eval()
        vocabulary = self.base.get_input_embeddings().num_embeddings
        try:
            return largest_leak(lambda batch: self.nats_and_hits(batch)[0], vocabulary, self.base.device)
        finally:
            self.model.train(training)

    @property
    def _head(self) -> Tensor | None:
        """The output head's weights if logits are the product with them. Not cached, because FSDP replaces them."""
        return self.base.get_output_embeddings().weight if self._head_is_plain else None

    def summed_nats(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the (weighted) sum of the negative log-likelihoods of a batch's supervised tokens, differentiable.

        Args:
            batch: a batch from `collate`.
        """
        targets = _targets(batch)
        chosen = targets != IGNORED  # (B, T)
        weights = batch["weights"].roll(-1, 1) if "weights" in batch else None  # (B, T)
        if self._fused is not None and self._head is not None:
            return self._fused.summed_nats(self._shares(batch, targets, weights), self._head)
        weights = None if weights is None else weights[chosen]
        hidden, logits = self._predictions(batch, chosen)
        if hidden is not None and self._head is not None:
            return summed_nats(hidden, self._head, targets[chosen], weights)
        assert logits is not None
        nats = functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
        return (nats if weights is None else nats * weights).sum()

    @torch.no_grad()
    def nats_and_hits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each supervised token's negative log-likelihood, and whether the token is the most probable one.

        A sequence of most probable tokens is what greedy decoding would write after the text before it.

        Args:
            batch: a batch from `collate`.

        Returns:
            The values at each token, (B, T), float32 and bool; 0 and False where nothing is supervised.
        """
        targets = _targets(batch)
        chosen = targets != IGNORED
        if self._fused is not None and self._head is not None:
            nats, hits = self._fused.nats_and_hits(self._shares(batch, targets), self._head)
            return _at_tokens(nats, chosen), _at_tokens(hits, chosen)
        hidden, logits = self._predictions(batch, chosen)
        if hidden is not None and self._head is not None:
            nats, hits = nats_and_hits(hidden, self._head, targets[chosen])
        else:
            assert logits is not None
            nats = functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
            hits = logits.argmax(-1) == targets[chosen]
        return _at_tokens(nats, chosen), _at_tokens(hits, chosen)

    def _predictions(self, batch: Mapping[str, Tensor], chosen: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the hidden states (M, hidden) of chosen tokens, or logits (M, vocabulary) if the head is not plain."""
        if self.layout == PADDED:
            return None, self._logits_of_pieces(batch, chosen)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with torch.autocast(batch["input_ids"].device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if self._head is None:
                return None, self.model(**inputs, use_cache=False).logits[chosen]
            hidden = self.base.model(**inputs, use_cache=False).last_hidden_state[chosen]
        return hidden.to(self._head.dtype), None

    def _logits_of_pieces(self, batch: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the logits (M, vocabulary) of chosen tokens, computed with each piece in a row of its own."""
        wanted = chosen.flatten()  # (B * T)
        groups = []
        for inputs, index in padded_rows(batch["position_ids"], batch["input_ids"]):
            groups.append((inputs, index, (index >= 0) & wanted[index.clamp(min=0)]))  # (P, L)
        found, places = [], []
        for inputs, index, used in [group for group in groups if group[2].any()] or groups[:1]:
            with torch.autocast(wanted.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                found.append(self.model(**inputs, use_cache=False).logits[used])
            places.append(index[used])
        return torch.cat(found)[torch.cat(places).argsort()]

    def _shares(self, batch: Mapping[str, Tensor], targets: Tensor, weights: Tensor | None = None) -> list[Share]:
        """Divide the rows of a batch into shares for threads, without padding: a row's last piece ends with the row."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        filled = torch.arange(ids.shape[1]) < batch["row_lengths"][:, None]  # (B, T)
        embedded = self.base.model.embed_tokens(ids)  # (B, T, hidden); NEFTune scales its noise by the row's length
        shares = []
        for rows in torch.arange(len(ids)).tensor_split(count_shares(len(ids), torch.get_num_threads())):
            here = filled[rows]
            x = embedded[rows][here]  # (N, hidden)
            chosen = (targets[rows] != IGNORED)[here]  # (N)
            wanted = targets[rows][here][chosen]
            weighed = None if weights is None else weights[rows][here][chosen]
            shares.append(Share(x, self._pieces(x[None], positions[rows][here]), chosen, wanted, weighed))
        return shares

    def _pieces(self, x: Tensor, positions: Tensor) -> Pieces:
        config = self.base.config
        starts = (positions == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], len(positions)]
        cos, sin = self.base.model.rotary_emb(x, position_ids=positions[None])  # (1, N, head size)
        half = cos.shape[-1] // 2
        return Pieces(
            lengths=[end - start for start, end in zip(starts, ends, strict=True)],
            cos=cos[0, :, None, :half].contiguous(),
            sin=sin[0, :, None, :half].contiguous(),
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            scale=self.base.model.layers[0].self_attn.scaling,
        )

    def _reason(self, recipe: Recipe) -> str | None:
        if not recipe.training.fused:
            return "training.fused is false"
        if self.base.device.type != "cpu":
            return "fused layers are written for a CPU"
        if self._head is None:
            return f"the output head of {type(self.base).__name__} is not a plain product"
        if recipe.base.quantization != "none":
            return "the base is quantized"
        if recipe.compute_dtype != recipe.base.dtype:
            return "fused layers compute in the number format of the weights"
        return cannot_fuse(self.base.model.layers, recipe.tokens.block_length)


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the token that each position predicts, (B, T): the label of the next one, and none at a row's end."""
    targets = batch["labels"].roll(-1, 1)
    targets[:, -1] = IGNORED
    return targets


def _at_tokens(values: Tensor, chosen: Tensor) -> Tensor:
    """Move the values (M) of the predicting positions to the tokens that they predict, (B, T); 0 elsewhere."""
    everywhere = torch.zeros(chosen.shape, dtype=values.dtype, device=values.device)
    return everywhere.masked_scatter_(chosen, values).roll(1, 1)
