"""transformers' own Mask2Former, small and with random weights."""

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig


def reference_model() -> Mask2FormerForUniversalSegmentation:
    """Mask2Former on a Swin of four stages, in evaluation mode."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=128,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_layers=2,
        decoder_layers=5, encoder_feedforward_dim=96, dim_feedforward=128, num_attention_heads=4, num_queries=13,
        num_labels=3,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # away from the symmetric start, where all offsets and weights are equal
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def feature_maps(model: Mask2FormerForUniversalSegmentation) -> list[torch.Tensor]:
    """The backbone's maps of two images of 128 x 96, fine to coarse."""
    with torch.no_grad():
        return list(model.model.pixel_level_module.encoder(torch.randn(2, 3, 128, 96)).feature_maps)
