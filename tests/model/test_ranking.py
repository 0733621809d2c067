"""Class logits that rank: probabilities times a factor, and Matrix NMS beside a plain loop over pairs."""

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from m2f_trainer.model.ranking import matrix_nms, rescaled


def scene(seed: int, queries: int = 40, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Class logits (Q, K + 1), and mask logits (Q, 24, 32) of discs that overlap, some of them the same."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    centre = torch.rand(queries, 2, 1, 1, generator=generator) * torch.tensor([24.0, 32.0]).view(2, 1, 1)
    radius = 2 + 6 * torch.rand(queries, 1, 1, generator=generator)
    masks = radius**2 - (y - centre[:, 0]) ** 2 - (x - centre[:, 1]) ** 2
    masks[5], masks[7], masks[9] = masks[4], masks[6], -1.0
    return 2 * torch.randn(queries, classes + 1, generator=generator), masks


def looped(class_logits: Tensor, mask_logits: Tensor) -> list[float]:
    """SOLOv2's decay, pair by pair, with pycocotools' IoUs."""
    probabilities = class_logits.double().softmax(-1)[:, :-1]
    best, label = probabilities.max(1)
    masks = (mask_logits > 0).numpy()
    means = [
        float(mask_logits[q].double().sigmoid()[masks[q]].mean()) if masks[q].any() else 0.0 for q in range(len(masks))
    ]
    score = [float(p) * mean for p, mean in zip(best, means, strict=True)]
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    overlap = coco_mask.iou(rles, rles, [0] * len(rles))
    order = sorted(range(len(score)), key=lambda q: (-score[q], q))
    better = {q: [i for i in order[:place] if label[i] == label[q]] for place, q in enumerate(order)}
    covered = {q: max((overlap[i, q] for i in better[q]), default=0.0) for q in order}
    decays = [
        min([(1 - overlap[i, q]) / max(1 - covered[i], 1e-6) for i in better[q]] + [1.0]) for q in range(len(score))
    ]
    return [max(decay, 1e-6) for decay in decays]


def test_decays_are_those_of_a_plain_loop_over_pairs() -> None:
    scenes = [scene(seed) for seed in range(4)]
    found = matrix_nms(torch.stack([classes for classes, _ in scenes]), torch.stack([masks for _, masks in scenes]))
    for decays, given in zip(found, scenes, strict=True):
        np.testing.assert_allclose(decays.numpy(), looped(*given), rtol=1e-3, atol=1e-5)
        assert (decays < 0.5).any()
        assert (decays == 1).any()


def test_of_two_equal_masks_the_better_stays_and_another_class_is_untouched() -> None:
    mask = scene(0)[1][:1]
    masks = torch.cat([mask, mask, mask, -mask.abs()])
    classes = torch.tensor([[2.0, 0, 0], [3.0, 0, 0], [0, 1.0, 0], [5.0, 0, 0]])
    found = matrix_nms(classes[None], masks[None])[0]
    torch.testing.assert_close(found, torch.tensor([1e-6, 1, 1, 1]))


def test_class_probabilities_are_multiplied_and_no_object_takes_the_rest() -> None:
    torch.manual_seed(0)
    classes, factor = 3 * torch.randn(2, 5, 4), torch.rand(2, 5)
    factor[0, 0], factor[0, 1] = 1, 1e-6
    classes[1, 0] = torch.tensor([60.0, 0, 0, 0])
    found = rescaled(classes, factor).softmax(-1)
    expected = classes.softmax(-1)[..., :-1] * factor.unsqueeze(-1)
    torch.testing.assert_close(found[..., :-1], expected)
    torch.testing.assert_close(found[..., -1], 1 - expected.sum(-1), rtol=1e-4, atol=1e-6)
