"""Mask2Former's transformer decoder: transformers' modules and weights, our forward.

The same numbers as transformers' `Mask2FormerTransformerModule` with less work. A query's mask at a coarse level is its
embedding times the mask features resized to that level, because resizing and the inner product commute; so no mask is
ever computed at full resolution and then resized.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerAttention,
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerTransformerModule,
)

from .attention import dot_product_attention


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of projected (B, Q, C) over (B, S, C), mask (B, 1, Q, S), true where allowed -> (B, Q, C)."""
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    return dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def linear_with_positions(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of hidden + positions, (B, S, C) and (1, S, C) -> (B, S, D), as the sum of two products.

    autograd would keep the sum for every layer; for the two products it keeps only `hidden`, which is kept anyway.
    """
    return F.linear(hidden, weight, bias) + F.linear(positions, weight)


def cross_attention(
    attention: nn.MultiheadAttention, query: Tensor, memory: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """torch's packed attention module, batch first: query (B, Q, C), memory (B, S, C) with positions (1, S, C).

    Returns (B, Q, C).
    """
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query = F.linear(query, weights[0], biases[0])
    key = linear_with_positions(memory, positions, weights[1], biases[1])
    value = F.linear(memory, weights[2], biases[2])
    output: Tensor = attention.out_proj(attend(query, key, value, attention.num_heads, mask))
    return output


def self_attention(attention: Mask2FormerAttention, hidden: Tensor, positions: Tensor) -> Tensor:
    """Queries among themselves: hidden (B, Q, C), positions (1, Q, C) -> (B, Q, C)."""
    placed = hidden + positions
    attended = attend(attention.q_proj(placed), attention.k_proj(placed), attention.v_proj(hidden), attention.num_heads)
    output: Tensor = attention.out_proj(attended)
    return output


def decoder_layer(
    layer: Mask2FormerMaskedAttentionDecoderLayer,
    hidden: Tensor,
    query_positions: Tensor,
    memory: Tensor,
    memory_positions: Tensor,
    mask: Tensor,
) -> Tensor:
    """Masked attention, self attention, feed-forward; post-norm. hidden (B, Q, C), memory (B, S, C) -> (B, Q, C)."""
    crossed = cross_attention(layer.cross_attn, hidden + query_positions, memory, memory_positions, mask)
    hidden = layer.cross_attn_layer_norm(hidden + crossed)
    hidden = layer.self_attn_layer_norm(hidden + self_attention(layer.self_attn, hidden, query_positions))
    inner = layer.fc2(layer.activation_fn(layer.fc1(hidden)))
    output: Tensor = layer.final_layer_norm(hidden + inner)
    return output


def attention_mask(embeddings: Tensor, features: Tensor) -> Tensor:
    """Mask of masked attention: each query attends inside its own predicted mask, or everywhere when that is empty.

    embeddings (B, Q, C), mask features at the level (B, C, h, w) -> (B, 1, Q, h x w) boolean. As the original:
    sigmoid(logit) >= 0.5, which is logit >= 0.
    """
    inside = torch.einsum("bqc,bcs->bqs", embeddings, features.flatten(2)) >= 0
    return (inside | ~inside.any(-1, keepdim=True)).unsqueeze(1)


class QueryDecoder(Mask2FormerTransformerModule):
    """Queries -> one hidden state and one mask embedding per query, after each layer."""

    def __init__(self, in_features: int, config: Mask2FormerConfig) -> None:
        super().__init__(in_features=in_features, config=config)
        for unused in (self.queries_embedder, self.level_embed) if not self.decoder.layers else ():
            unused.requires_grad_(False)  # otherwise DDP stops
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor]  # transformers sets it with the flag

    def forward(  # type: ignore[override]
        self, levels: Sequence[Tensor], mask_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, C, h, w), coarse to fine, and mask features (B, C, H/4, W/4) -> hidden, embeddings (L, B, Q, C).

        L is the number of layers + 1: the queries themselves are the first prediction.
        """
        batch = mask_features.shape[0]
        memory, positions = self._memory(levels)
        small = [_resize(mask_features, level) for level in levels]
        query_positions = self.queries_embedder.weight.unsqueeze(0)
        hidden = self.queries_features.weight.unsqueeze(0).expand(batch, -1, -1)
        normed = self.decoder.layernorm(hidden)
        states, embeddings = [normed], [self.decoder.mask_predictor.mask_embedder(normed)]
        for index, layer in enumerate(self.decoder.layers):
            level = index % self.num_feature_levels
            with torch.no_grad():
                mask = attention_mask(embeddings[-1], small[level])
            hidden = self._run(layer, hidden, query_positions, memory[level], positions[level], mask)
            normed = self.decoder.layernorm(hidden)
            states.append(normed)
            embeddings.append(self.decoder.mask_predictor.mask_embedder(normed))
        return torch.stack(states), torch.stack(embeddings)

    def _memory(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys and their positions for each level, (B, S, C) and (1, S, C)."""
        memory, positions = [], []
        for index, (project, feature) in enumerate(zip(self.input_projections, levels, strict=True)):
            memory.append(project(feature).flatten(2).transpose(1, 2) + self.level_embed.weight[index])
            place = self.position_embedder((1, *feature.shape[1:]), feature.device, feature.dtype)
            positions.append(place.flatten(2).transpose(1, 2))
        return memory, positions

    def _run(self, layer: Any, *tensors: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(decoder_layer, layer, *tensors)
        return decoder_layer(layer, *tensors)


@torch.no_grad()
def _resize(mask_features: Tensor, level: Tensor) -> Tensor:
    """Mask features resized to a level, without gradient: they are used for the attention mask only."""
    return F.interpolate(mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False)
