"""A training loss that tells objects apart by the mask features of their pixels.

The instance discrimination of MaX-DeepLab (Wang et al. 2021, https://arxiv.org/abs/2012.00759, section 3.4), with the
background as one more object of each image. Mask2Former's own losses reach the mask features only through queries,
which know no object at first; this one reaches them from the first step on. It has no weights of its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compact_masks import CompactMasks

TEMPERATURE = 0.2


def discrimination(features: Tensor, masks: CompactMasks, counts: Sequence[int], points: Tensor) -> Tensor:
    """Cross entropy between each point's object and the nearest of the objects' mean features: a sum over objects.

    features (B, C, h, w); `counts`, how many of the T masks each image has; points (B, P, 2), x and y in [0, 1]. Near
    is a high cosine, divided by `TEMPERATURE`. An object's loss is the mean over its points; an object without a point
    has none, and an image without objects neither.
    """
    sampled = F.grid_sample(features, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)  # (B, C, P)
    total, start = features.new_zeros(()), 0
    for image, count in enumerate(counts):
        if count:
            which = torch.arange(start, start + count, device=features.device)
            truth = masks.sample(which, points[image].expand(count, -1, -1)) >= 0.5
            truth = torch.cat([truth, ~truth.any(0, keepdim=True)])  # (N + 1, P): the background comes last
            total = total + _of_image(sampled[image], truth)
        start += count
    return total


def _of_image(features: Tensor, truth: Tensor) -> Tensor:
    """Features (C, P) and whose each point is, (N + 1, P) -> the sum over objects."""
    area = truth.sum(1, keepdim=True)
    unit = F.normalize(features, dim=0)
    means = F.normalize((truth.to(unit) @ unit.T) / area.clamp(min=1), dim=1)
    logits = (means @ unit / TEMPERATURE).masked_fill(area == 0, float("-inf"))
    losses = torch.logsumexp(logits, 0) - logits
    return (losses.masked_fill(~truth, 0) / area.clamp(min=1)).sum()
