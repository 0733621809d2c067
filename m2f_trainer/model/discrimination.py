"""Instance discrimination loss: a contrastive loss that separates objects by the mask features of their pixels.

The instance discrimination of MaX-DeepLab (Wang et al. 2021, https://arxiv.org/abs/2012.00759, section 3.4), with the
background as an additional object of each image. As in its panoptic masks, a point belongs to one object: the smallest
of those that contain it. Otherwise the points of a window would be pulled towards both the window and its facade, and
pushed away from both. Mask2Former's own losses train the mask features only through the queries, which do not represent
objects at first; this loss trains them directly from the first step. It has no weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.2


def discrimination(features: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Cross entropy of assigning each point to its object by the objects' mean features, summed over objects.

    features (B, C, P) and the masks of each image [(N_b, P)], in [0, 1], at the same points. The logits are cosine
    similarities divided by `TEMPERATURE`. An object's loss is the mean over its points, without those of smaller
    objects in it. Objects without a point and images without objects contribute 0.
    """
    total = features.new_zeros(())
    for image, target in enumerate(targets):
        if len(target):
            truth = target >= 0.5
            truth = torch.cat([_smallest(truth), ~truth.any(0, keepdim=True)])  # (N + 1, P): the background comes last
            total = total + _of_image(features[image], truth)
    return total


def _smallest(truth: Tensor) -> Tensor:
    """Masks (N, P), in any order -> smallest first, without the points of smaller objects."""
    ordered = truth[truth.sum(1).argsort(stable=True)]
    return ordered & (ordered.cumsum(0) == 1)


def _of_image(features: Tensor, truth: Tensor) -> Tensor:
    """Features (C, P) and each point's object as one-hot rows (N + 1, P) -> the loss summed over objects."""
    area = truth.sum(1, keepdim=True)
    unit = F.normalize(features, dim=0)
    means = F.normalize((truth.to(unit) @ unit.T) / area.clamp(min=1), dim=1)
    logits = (means @ unit / TEMPERATURE).masked_fill(area == 0, float("-inf"))
    losses = torch.logsumexp(logits, 0) - logits
    return (losses.masked_fill(~truth, 0) / area.clamp(min=1)).sum()
