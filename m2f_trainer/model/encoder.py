"""The encoder: a backbone, and a neck that makes Mask2Former's four maps from its features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig

from .attention import NAME as ATTENTION
from .neck import build_neck


class Encoder(nn.Module):
    """Backbone and neck. `channels` are those of the four maps, fine to coarse.

    A backbone without trainable weights runs in evaluation mode and without a graph.
    """

    def __init__(
        self, backbone: PreTrainedConfig, neck: str, neck_channels: Sequence[int] | None, last_norm: bool = True
    ) -> None:
        super().__init__()
        self.backbone = AutoBackbone.from_config(backbone)
        if self.backbone._supports_sdpa:
            self.backbone.set_attn_implementation(ATTENTION)
        if not last_norm:
            self.backbone.norm = nn.Identity()
        self.neck, self.channels = build_neck(neck, backbone, neck_channels)
        _deepen_drop_path(self.backbone)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("mask_token") or not parameter.numel():
                parameter.requires_grad_(False)  # used in pretraining only; and FSDP refuses empty parameters

    @property
    def frozen(self) -> bool:
        """True when no parameter of the backbone is trained."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode; a frozen backbone stays in evaluation mode (no drop path, no RoPE jitter).

        Batch norms stay in it too: their statistics are those of pretraining, as in the original (FrozenBN), because
        batches are small.
        """
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> four maps, fine to coarse, (B, C_i, h_i, w_i).

        `maps`: the backbone's feature maps if already computed (see `backbone_features`).
        """
        four: list[Tensor] = self.neck(self.backbone_features(pixel_values) if maps is None else maps, pixel_values)
        return four

    def backbone_features(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Normalised images (B, 3, H, W) -> the backbone's feature maps, (B, C, h, w) each."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps: Sequence[Tensor] = self.backbone(pixel_values).feature_maps
        return maps


def _deepen_drop_path(backbone: nn.Module) -> None:
    """Raise a ViT's drop path from 0 at its first layer to the configured rate at its last.

    Linear decay rule of stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382, section 3).
    transformers gives every ViT layer the same rate; its ConvNeXt already follows the rule.
    """
    drops: list[Any] = [module for name, module in backbone.named_modules() if name.endswith(".drop_path")]
    rates = [drop.drop_prob for drop in drops if not isinstance(drop, nn.Identity)]
    if len(rates) == len(drops) and len(set(rates)) == 1:
        for depth, drop in enumerate(drops):
            drop.drop_prob = rates[0] * depth / max(len(drops) - 1, 1)
