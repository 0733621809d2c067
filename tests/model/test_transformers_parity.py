"""Our loss against transformers' own, with the same points."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import Mask2FormerConfig, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.criterion import Criterion, LossSettings, Points

POINTS = 256


@pytest.mark.parametrize("class_weights", [(), (0.5, 3.0, 1.0, 20.0)], ids=["equal", "weighted"])
def test_loss_terms_and_gradients_are_transformers_given_the_same_points(class_weights: tuple[float, ...]) -> None:
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
    if class_weights:
        reference.empty_weight[:-1] = torch.tensor(class_weights)
    pairs = 8
    points = Points(
        torch.rand(2, POINTS, 2, dtype=dtype),
        torch.rand(outputs * pairs, POINTS * 3, 2, dtype=dtype),
        torch.rand(outputs * pairs, POINTS - int(0.75 * POINTS), 2, dtype=dtype),
    )
    mine = Criterion(labels, LossSettings(num_points=POINTS, class_weights=class_weights))(
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
