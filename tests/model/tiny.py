"""Tiny random models for tests: no download, milliseconds to build."""

from typing import Any

import torch

from m2f_trainer.model.build import build_model
from m2f_trainer.model.mask2former import M2FModel

VIT = {
    "model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "patch_size": 8,
}  # fmt: skip
CONVNEXT = {"model_type": "dinov3_convnext", "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
DINOV2 = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 56, "mlp_ratio": 2,
}  # fmt: skip
HEAD = {
    "num_queries": 7, "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1,
    "decoder_layers": 4, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2,
    "train_num_points": 64, "neck": "pyramid",
}  # fmt: skip
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}]


def tiny_model(backbone: Any = None, **fields: Any) -> M2FModel:
    """A model for images of 64 x 64 pixels by default."""
    torch.manual_seed(0)
    given = {"image_size": (64, 64), **HEAD, **fields}
    return build_model(backbone or VIT, given.pop("categories", CATEGORIES), **given)


def images(count: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    """uint8 noise (B, 3, H, W)."""
    return torch.randint(
        0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


def labels(height: int = 64, width: int = 64) -> dict[str, Any]:
    """Two images: two overlapping objects, and none."""
    masks = torch.zeros(2, height, width)
    masks[0, 8:30, 8:40] = 1
    masks[1, 20:50, 30:60] = 1
    empty = torch.zeros(0, dtype=torch.long)
    return {"mask_labels": [masks, masks[:0]], "class_labels": [torch.tensor([0, 1]), empty]}
