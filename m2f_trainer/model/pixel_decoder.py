"""Mask2Former's pixel decoder: transformers' modules and weights, our forward.

The same numbers as transformers' `Mask2FormerPixelDecoder` with less work: positions are computed once for the
batch, samples are not kept for backward, and the host never waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
)

from .deformable_attention import deformable_attention, small_softmax
from .transformer_decoder import linear_with_positions

Shape = tuple[int, int]


def reference_points(shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
    """The reference point of each position in every level: (S, L, 2), (x, y) in pixels; 0 is the first pixel's centre.

    All values are created on the device, to avoid a host-to-device copy in each layer.
    """
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1))
    unit = torch.cat(centres)
    return torch.stack([unit * _sides(shape, device) - 0.5 for shape in shapes], dim=1)


def _sides(shape: Shape, device: torch.device) -> Tensor:
    """(2,): width and height."""
    return torch.stack([torch.full((), side, dtype=torch.float32, device=device) for side in shape[::-1]])


def encoder_layer(
    layer: Mask2FormerPixelDecoderEncoderLayer,
    hidden: Tensor,
    positions: Tensor,
    references: Tensor,
    shapes: tuple[Shape, ...],
    recompute: bool = False,
) -> Tensor:
    """One deformable layer, post-norm: hidden (B, S, C), positions (1, S, C), references (S, L, 2) -> (B, S, C).

    With `recompute`, the feed-forward part is computed again in the backward pass: its inner activations are the
    largest of a layer.
    """
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    heads, levels, points = attention.n_heads, attention.n_levels, attention.n_points
    value = attention.value_proj(hidden).view(batch, length, heads, -1)
    with torch.autocast(hidden.device.type, enabled=False):
        offsets = linear_with_positions(
            hidden, positions, attention.sampling_offsets.weight, attention.sampling_offsets.bias
        )
        weights = linear_with_positions(
            hidden, positions, attention.attention_weights.weight, attention.attention_weights.bias
        )
    weights = small_softmax(weights.view(batch, length, heads, levels * points))
    weights = weights.view(batch, length, heads, levels, points)
    around = (
        references.unsqueeze(2).expand(-1, -1, points, -1).flatten(1)
    )  # broadcasting along the last dimensions is slow on a CPU
    places = (around.unsqueeze(1) + offsets.view(batch, length, heads, -1)).view(*weights.shape, 2)
    attended = attention.output_proj(deformable_attention(value, shapes, places, weights.to(places.dtype)))
    hidden = layer.self_attn_layer_norm(hidden + F.dropout(attended, layer.dropout, layer.training))
    if recompute:
        update = checkpoint(_feed_forward, layer, hidden, use_reentrant=False, preserve_rng_state=layer.dropout > 0)
    else:
        update = _feed_forward(layer, hidden)
    output: Tensor = layer.final_layer_norm(hidden + update)
    return output


def _feed_forward(layer: Mask2FormerPixelDecoderEncoderLayer, hidden: Tensor) -> Tensor:
    """(B, S, C) -> (B, S, C)."""
    inner = F.dropout(F.relu(layer.fc1(hidden), inplace=True), layer.activation_dropout, layer.training)
    return F.dropout(layer.fc2(inner), layer.dropout, layer.training)


def project(layers: Any, feature: Tensor) -> Tensor:
    """Convolution, group norm and activation, (B, C, h, w) -> (B, C', h, w); the norm in the type of its weights.

    So it is under CUDA's autocast too. On a CPU, sums over all positions would lose most of their digits in bfloat16.
    """
    convolution, norm, *activation = layers
    if not torch.is_autocast_enabled(feature.device.type):  # an exported model may have its encoder in half precision
        feature = feature.to(convolution.weight.dtype)
    feature = norm(convolution(feature).to(norm.weight.dtype))
    output: Tensor = nn.Sequential(*activation)(feature)
    return output


class PixelDecoder(Mask2FormerPixelDecoder):
    """Backbone maps -> per-pixel embeddings and three maps for the queries to attend to.

    Under autocast, convolutions and linear layers compute in its type, and norms, sampling places, attention weights
    and sums of samples in float32. The original computes everything here in float32, at twice the time on a GPU.

    Attributes:
        recompute_feed_forward: compute the feed-forward parts again in the backward pass, for less memory. With
            `gradient_checkpointing`, whole layers are recomputed anyway.
    """

    def __init__(self, config: Mask2FormerConfig, feature_channels: Sequence[int]) -> None:
        super().__init__(config, feature_channels=list(feature_channels))
        self.level_embed.requires_grad_(config.encoder_layers > 0)  # otherwise unused, which stops DDP
        self.recompute_feed_forward = True
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor]  # transformers sets it with the flag

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Four maps, fine to coarse -> mask features (B, C, H/4, W/4) and three maps (B, C, h, w), coarse to fine."""
        levels = self._encode(features[::-1][: self.num_feature_levels])
        finest = levels[-1]
        for lateral, output, feature in zip(
            self.lateral_convolutions,
            self.output_convolutions,
            features[: self.num_fpn_levels][::-1],
            strict=True,
        ):
            side = project(lateral, feature)
            finest = project(output, side + F.interpolate(finest, size=side.shape[-2:], mode="bilinear"))
        return self.mask_projection(finest).to(finest.dtype), levels

    def _encode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Run the deformable encoder over maps, coarse to fine: [(B, C_i, h, w)] -> [(B, C, h, w)]."""
        inputs = [project(layers, feature) for layers, feature in zip(self.input_projections, maps, strict=True)]
        shapes = tuple((feature.shape[-2], feature.shape[-1]) for feature in inputs)
        positions = [
            self.position_embedding((1, *feature.shape[1:]), feature.device, feature.dtype).flatten(2).transpose(1, 2)
            + self.level_embed[level]
            for level, feature in enumerate(inputs)
        ]
        hidden = torch.cat([feature.flatten(2).transpose(1, 2) for feature in inputs], dim=1)  # (B, S, C)
        flat_positions = torch.cat(positions, dim=1)  # (1, S, C)
        references = reference_points(shapes, hidden.device)
        for layer in self.encoder.layers:
            hidden = self._run(layer, hidden, flat_positions, references, shapes)
        parts = hidden.split([height * width for height, width in shapes], dim=1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _run(
        self, layer: Any, hidden: Tensor, positions: Tensor, references: Tensor, shapes: tuple[Shape, ...]
    ) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(encoder_layer, layer, hidden, positions, references, shapes)
        recompute = self.recompute_feed_forward and self.training
        return encoder_layer(layer, hidden, positions, references, shapes, recompute)
