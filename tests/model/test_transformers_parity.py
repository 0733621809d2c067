"""Our forward and loss against transformers' own Mask2Former, same weights and points."""

from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.criterion import Criterion, LossSettings, Points
from m2f_trainer.model.pixel_decoder import PixelDecoder
from m2f_trainer.model.transformer_decoder import QueryDecoder

POINTS = 256


def stock(dtype: torch.dtype = torch.float32) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=128,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_layers=2,
        decoder_layers=5, encoder_feedforward_dim=96, dim_feedforward=128, num_attention_heads=4, num_queries=13,
        num_labels=3, train_num_points=POINTS,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).to(dtype)
    with torch.no_grad():  # away from the symmetric start, where all offsets and weights are equal
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def ours(model: Mask2FormerForUniversalSegmentation) -> tuple[PixelDecoder, QueryDecoder]:
    dtype = model.dtype
    pixel = PixelDecoder(model.config, model.model.pixel_level_module.encoder.channels).to(dtype)
    query = QueryDecoder(model.config.feature_size, model.config).to(dtype)
    pixel.load_state_dict(model.model.pixel_level_module.decoder.state_dict())
    query.load_state_dict(model.model.transformer_module.state_dict())
    return pixel, query


def test_decoders_give_what_transformers_gives() -> None:
    model = stock()
    pixel, query = ours(model)
    images = torch.randn(2, 3, 128, 96)
    maps = model.model.pixel_level_module.encoder(images).feature_maps
    expected = model(images, output_auxiliary_logits=True)
    features, levels = pixel(maps)
    hidden, embeddings = query(levels, features)
    masks = torch.einsum("lbqc,bchw->lbqhw", embeddings, features)
    classes = model.class_predictor(hidden)
    torch.testing.assert_close(masks[-1], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classes[-1], expected.class_queries_logits, rtol=1e-4, atol=1e-4)
    for level, auxiliary in enumerate(expected.auxiliary_logits):
        torch.testing.assert_close(masks[level], auxiliary["masks_queries_logits"], rtol=1e-4, atol=1e-4)


def test_loss_terms_and_gradients_are_transformers_given_the_same_points() -> None:
    torch.manual_seed(1)
    dtype = torch.float64
    outputs, queries, channels, labels = 3, 7, 8, 4
    embeddings = torch.randn(outputs, 2, queries, channels, dtype=dtype, requires_grad=True)
    features = torch.randn(2, channels, 16, 20, dtype=dtype, requires_grad=True)
    classes = torch.randn(outputs, 2, queries, labels + 1, dtype=dtype, requires_grad=True)
    truth = [torch.rand(3, 64, 80) > 0.7, torch.rand(5, 64, 80) > 0.6]
    class_labels = [torch.tensor([0, 3, 1]), torch.tensor([2, 2, 0, 1, 3])]
    config = Mask2FormerConfig(backbone_config=SwinConfig(), num_labels=labels, train_num_points=POINTS)
    reference = Mask2FormerLoss(config, {}).to(dtype)
    reference.empty_weight[-1] = 0.1  # not its float32 rounding
    pairs = 8
    points = Points(
        torch.rand(2, POINTS, 2, dtype=dtype),
        torch.rand(outputs * pairs, POINTS * 3, 2, dtype=dtype),
        torch.rand(outputs * pairs, POINTS - int(0.75 * POINTS), 2, dtype=dtype),
    )
    mine = Criterion(labels, LossSettings(num_points=POINTS))(
        embeddings, features, classes, CompactMasks.from_dense(truth), class_labels, points=points
    )
    gradients = torch.autograd.grad(torch.stack(list(mine.values())).sum(), (embeddings, features, classes))

    masks = torch.einsum("lbqc,bchw->lbqhw", embeddings, features)
    expected: dict[str, list[Tensor]] = {"loss_cross_entropy": [], "loss_mask": [], "loss_dice": []}
    # our pairs are ordered image, level; transformers draws per level for all images
    first = outputs * 3
    for level in range(outputs):
        rows = [*range(level * 3, level * 3 + 3), *range(first + level * 5, first + level * 5 + 5)]
        draws = iter([points.matching[:1], points.matching[1:], points.candidates[rows], points.random[rows]])
        with patch("torch.rand", lambda *args, draws=draws, **kwargs: next(draws)):
            terms = reference(masks[level], classes[level], [t.to(dtype) for t in truth], class_labels)
        for name, weight in (("loss_cross_entropy", 2), ("loss_mask", 5), ("loss_dice", 5)):
            expected[name].append(weight * terms[name])
    for name, values in expected.items():
        torch.testing.assert_close(mine[name], torch.stack(values), rtol=1e-12, atol=1e-12)
    total = torch.stack([term for values in expected.values() for term in values]).sum()
    for mine_, theirs in zip(gradients, torch.autograd.grad(total, (embeddings, features, classes)), strict=True):
        torch.testing.assert_close(mine_, theirs, rtol=1e-10, atol=1e-12)
