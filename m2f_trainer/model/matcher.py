"""Hungarian matching of all decoder outputs to the targets at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .compact_masks import chunks


@dataclass(frozen=True)
class Matches:
    """The M matched pairs of all L decoder outputs, ordered by image; each tensor is int64 (M,)."""

    level: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index into the batch's T targets
    per_image: list[int]  # number of pairs per image, known on the host without a device synchronisation


@torch.no_grad()
def pair_costs(
    logits: Tensor, probabilities: Tensor, targets: Tensor, classes: Tensor, weights: Mapping[str, float]
) -> Tensor:
    """Matching cost of every query and target, for all outputs of one image -> (L, Q, N).

    logits (L, Q, P) and targets (N, P) at the same points, probabilities (L, Q, K + 1), classes (N,). As the original
    matcher (Cheng et al. 2022, https://arxiv.org/abs/2112.01527, and its matcher.py): weighted sum of -p(class), mean
    binary cross entropy, and dice. With x the logit and t the target, the cross entropy is softplus(x) - x t.
    """
    costs = logits.new_empty(*logits.shape[:2], len(targets))
    area, points = targets.sum(-1), logits.shape[-1]
    for part in chunks(len(logits), logits[0].numel(), logits.device):
        x = logits[part]
        inside = x.sigmoid()
        cross_entropy = (F.softplus(x).sum(-1, keepdim=True) - x @ targets.T) / points
        dice = 1 - (2 * (inside @ targets.T) + 1) / (inside.sum(-1, keepdim=True) + area + 1)
        unlikely = -probabilities[part][..., classes]
        costs[part] = weights["mask"] * cross_entropy + weights["class"] * unlikely + weights["dice"] * dice
    return costs


@torch.no_grad()
def match(
    embeddings: Tensor,
    features: Tensor,
    class_logits: Tensor,
    targets: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    weights: Mapping[str, float],
) -> Matches:
    """Match every decoder output to the targets, with one copy to the host and one back.

    embeddings (L, B, Q, C), class_logits (L, B, Q, K + 1). features (B, C, P) and targets [(N_b, P)] are sampled at the
    same P points of an image, which all outputs share. Costs are float32 also under autocast. Non-finite costs are
    matched last, as transformers does.
    """
    probabilities = class_logits.softmax(-1)
    costs = []
    for image, (target, classes) in enumerate(zip(targets, class_labels, strict=True)):
        if len(classes):
            logits = (embeddings[:, image].flatten(0, 1) @ features[image]).unflatten(0, (len(embeddings), -1))
            costs.append(pair_costs(logits, probabilities[:, image], target, classes, weights))
    return _assign(costs, [len(classes) for classes in class_labels], class_logits)


def _assign(costs: list[Tensor], counts: list[int], like: Tensor) -> Matches:
    """Solve the assignments on the host: costs of the images with targets, (L, Q, N) each."""
    if not costs:
        empty = torch.zeros(0, dtype=torch.int64, device=like.device)
        return Matches(empty, empty, empty, empty, [0] * len(counts))
    worst = torch.finfo(torch.float32).max
    flat = torch.cat([cost.flatten() for cost in costs]).float()
    host = torch.nan_to_num(flat, nan=worst, posinf=worst, neginf=worst).cpu().numpy()
    levels, _, queries, _ = like.shape
    rows: list[Tensor] = []
    read, start = 0, 0
    for image, count in enumerate(counts):
        if count:
            block = host[read : read + levels * queries * count].reshape(levels, queries, count)
            read += block.size
            for level in range(levels):
                query, target = (torch.from_numpy(index) for index in linear_sum_assignment(block[level]))
                place = torch.tensor([level, image]).unsqueeze(1).expand(2, len(query))
                rows.append(torch.cat([place, query.unsqueeze(0), target.unsqueeze(0) + start]))
        start += count
    pairs = torch.cat(rows, dim=1)
    if like.is_cuda:
        pairs = pairs.pin_memory()
    level, image, query, target = pairs.to(like.device, non_blocking=True)
    return Matches(level, image, query, target, [levels * min(count, queries) for count in counts])
