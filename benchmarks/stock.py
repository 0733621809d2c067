"""The model that ours is compared with: transformers' own Mask2Former, with the same encoder and weights."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from m2f_trainer.data.collate import pack_masks
from m2f_trainer.model.build import build_model
from m2f_trainer.model.encoder import Encoder
from m2f_trainer.model.mask2former import M2FModel

VIT = {"model_type": "dinov3_vit", "patch_size": 16, "use_gated_mlp": True, "hidden_act": "silu"}
BACKBONES: dict[str, dict[str, Any]] = {
    "tiny": {**VIT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "vits16plus": {**VIT, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "vitl16": {
        "model_type": "dinov3_vit", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}  # fmt: skip
"""Configurations of random weights: a benchmark needs no download."""

CATEGORIES = [{"id": k + 1, "name": f"class {k}"} for k in range(80)]


def our_model(backbone: str, side: int, **fields: Any) -> M2FModel:
    """A model of ours with random weights, for square images."""
    torch.manual_seed(0)
    config = BACKBONES[backbone]
    taps = (config.get("num_hidden_layers", 12),)
    return build_model(config, CATEGORIES, image_size=(side, side), neck="pyramid", taps=taps, **fields)


class StockEncoder(nn.Module):
    """Our encoder with the interface that transformers' pixel level module expects: `channels` and `feature_maps`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.channels = encoder.channels

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """(B, 3, H, W) -> an object whose `feature_maps` are four maps."""
        return SimpleNamespace(feature_maps=self.encoder(pixel_values))


def stock_model(ours: M2FModel) -> Mask2FormerForUniversalSegmentation:
    """transformers' Mask2Former around a copy of our encoder, with our weights."""
    kept = set(Mask2FormerConfig().to_dict()) - {"backbone_config", "model_type", "architectures", "id2label"}
    fields = {name: value for name, value in ours.config.to_dict().items() if name in kept}
    labels = {"id2label": ours.config.id2label, "label2id": ours.config.label2id}
    small = SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=["stage1"])
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**{**fields, **labels}, backbone_config=small))
    level, mine = model.model.pixel_level_module, ours.model.pixel_level_module
    level.encoder = StockEncoder(copy.deepcopy(mine.encoder))
    level.decoder = Mask2FormerPixelDecoder(model.config, feature_channels=list(mine.encoder.channels))
    level.decoder.load_state_dict(mine.decoder.state_dict())
    model.model.transformer_module.load_state_dict(ours.model.transformer_module.state_dict())
    model.class_predictor.load_state_dict(ours.class_predictor.state_dict())
    return model


def scene(
    batch: int, side: int, instances: int, device: str = "cpu", *, dense: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same random images and ellipses as two batches: ours, as the collator makes it, and transformers'.

    Without `dense`, transformers' batch has no masks, which would take four bytes a pixel each.
    """
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    boxes = _boxes(batch * instances, side, generator)
    bitmaps = [_ellipse(int(y1 - y0), int(x1 - x0)) for x0, y0, x1, y1 in boxes.tolist()]
    masks = torch.zeros(batch * instances if dense else 0, side, side)
    for mask, bitmap, (x0, y0, x1, y1) in zip(masks, bitmaps, boxes.tolist(), strict=False):
        mask[y0:y1, x0:x1] = bitmap
    classes = torch.randint(0, len(CATEGORIES), (batch, instances), generator=generator).to(device)
    packed = pack_masks([bitmap.numpy() for bitmap in bitmaps], boxes)
    ours = {
        "pixel_values": pixels.to(device),
        "pixel_mask": torch.ones(batch, side, side, dtype=torch.bool, device=device),
        "mask_labels": {name: value.to(device) for name, value in packed.items()},
        "class_labels": list(classes),
    }
    scaled = pixels / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    stock = {
        "pixel_values": ((scaled - mean) / std).to(device),
        "pixel_mask": torch.ones(batch, side, side, dtype=torch.long, device=device),
        "mask_labels": list(masks.to(device).split(instances)),
        "class_labels": list(classes),
    }
    return ours, stock


def _boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 4) x0, y0, x1, y1; sides from 3 % to 50 % of the frame, uniform on a log scale, about as in COCO."""
    share = 0.03 * (0.5 / 0.03) ** torch.rand(count, 2, generator=generator)
    sides = (share * side).long().clamp(min=2)
    low = (torch.rand(count, 2, generator=generator) * (side - sides)).long()
    return torch.cat([low, low + sides], dim=1).to(torch.int32)


def _ellipse(height: int, width: int) -> Tensor:
    """uint8 (height, width)."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return (y[:, None] ** 2 + x[None] ** 2 <= 1).to(torch.uint8)
