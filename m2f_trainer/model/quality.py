"""Mask quality head: a small MLP that predicts each mask's IoU with its object, used to rank predictions.

As in Mask Scoring R-CNN (Huang et al. 2019, https://arxiv.org/abs/1903.00241): the class head is trained to predict
whether there is an object, and its loss does not depend on how well the mask fits.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .compact_masks import CompactMasks, chunks_of_images, pair_logits
from .initialization import init_class_head

MEASURES, WIDTH = 5, 32
EPSILON = 1e-3
GRID = 32
"""Points per side of the grid on which an IoU is measured."""
QUERY_STRIDE = 4
"""In training the head is applied to every fourth query, and learns as much (benchmarks/accuracy/TABLES.md)."""


class QualityHead(nn.Module):
    """Predict the logit of each mask's IoU with an MLP on five features of the mask (see `measures`).

    A head on query embeddings overfits the training images; these features generalise. They are computed without
    gradient, so that the head does not affect the training of backbone, class head and masks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(MEASURES, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.score = nn.Linear(WIDTH, 1)

    def initialize(self) -> None:
        """Initialise as torch does, and the last layer with 0: a new head in a trained model keeps the ranking."""
        for layer in self.layers:
            init_class_head(cast(nn.Linear, layer))
        init.zeros_(self.score.weight)
        init.zeros_(self.score.bias)

    def forward(self, mask_logits: Tensor, features: Tensor) -> Tensor:
        """Mask logits (B, Q, h, w) and mask features (B, C, h, w) -> logits (B, Q)."""
        measured = measures(mask_logits, features).to(self.score.weight.dtype)
        for layer in self.layers:
            measured = F.relu(layer(measured))
        logits: Tensor = self.score(measured).squeeze(-1)
        return logits


def seen_queries(training: bool) -> slice:
    """The queries that the head is applied to: every `QUERY_STRIDE`-th in training, otherwise all."""
    return slice(None, None, QUERY_STRIDE if training else 1)


@torch.no_grad()
def measures(mask_logits: Tensor, features: Tensor) -> Tensor:
    """Features that predict a mask's IoU: mask logits (B, Q, h, w), mask features (B, C, h, w) -> float32 (B, Q, 5).

    The area; the mean probability inside; the stability of the mask under a change of threshold (the stability score of
    Segment Anything, Kirillov et al. 2023, https://arxiv.org/abs/2304.02643); the length of the mean unit feature
    inside; and the mean cosine to it in a ring of one cell around the mask, which is high where the mask ends
    within its object.
    """
    with torch.autocast(features.device.type, enabled=False):
        logits = mask_logits.float()
        inside = logits.sigmoid()
        hard = (logits > 0).float().flatten(2)  # (B, Q, h x w)
        ring = (dilated(inside) - inside).flatten(2)
        stability = (logits > 1).float().flatten(2).sum(-1) / (logits > -1).float().flatten(2).sum(-1).clamp(min=1)
        inside = inside.flatten(2)
        area = inside.sum(-1)
        unit = F.normalize(features.float().flatten(2), dim=1).transpose(1, 2)  # (B, h x w, C)
        mean = inside @ unit / (area + EPSILON).unsqueeze(-1)  # (B, Q, C)
        around = ring @ unit / (ring.sum(-1) + EPSILON).unsqueeze(-1)
        coherence = mean.norm(dim=-1)
        ring_similarity = (mean * around).sum(-1) / (coherence + EPSILON)
        confidence = (inside * hard).sum(-1) / hard.sum(-1).clamp(min=1)
        return torch.stack([(area + EPSILON).log() / 4, confidence, stability, coherence, ring_similarity], -1)


def dilated(values: Tensor) -> Tensor:
    """The largest value in the 3 x 3 cells around each: (..., h, w), none negative -> the same shape.

    As `F.max_pool2d(values, 3, stride=1, padding=1)`, which takes 10 times as long on a CPU.
    """
    padded = F.pad(values, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(padded[..., :-2, :], padded[..., 1:-1, :]), padded[..., 2:, :])
    return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


@torch.no_grad()
def best_overlaps(
    embeddings: Tensor, features: Tensor, masks: CompactMasks, sampled: Tensor, targets: Sequence[Tensor]
) -> Tensor:
    """IoU of each query's mask with the best matching object of its image: (B, Q), 0 without objects.

    embeddings (B, Q, D), features (B, D, h, w). The best matching object is determined at points: sampled (B, D, P) are
    the features and targets [(N_b, P)] the masks there.
    """
    counts = [embeddings.shape[1] if len(target) else 0 for target in targets]
    if not any(counts):
        return embeddings.new_zeros(embeddings.shape[:2], dtype=torch.float32)
    best, start = [], 0
    for image, target in enumerate(targets):
        if len(target):
            true = (target >= 0.5).to(sampled)  # (N, P)
            predicted = (embeddings[image] @ sampled[image] > 0).to(sampled)  # (Q, P)
            common = predicted @ true.T
            best.append(start + (common / (predicted.sum(1, True) + true.sum(1) - common).clamp(min=1)).argmax(1))
        start += len(target)
    own = torch.cat([embeddings[image] for image, count in enumerate(counts) if count])
    found = overlaps(own, features, masks, torch.cat(best), counts).split(counts)
    return torch.stack([one if len(one) else one.new_zeros(embeddings.shape[1]) for one in found])


@torch.no_grad()
def overlaps(
    embeddings: Tensor, features: Tensor, masks: CompactMasks, targets: Tensor, counts: Sequence[int]
) -> Tensor:
    """IoU of M pairs of predicted and target masks: float32 (M,). Pair m is embeddings[m] and mask targets[m].

    embeddings (M, D) ordered by image, counts[b] of image b, features (B, D, h, w). Both masks are sampled on a grid in
    the smallest box around the two, so that the relative precision does not depend on the object's size.
    """
    found = embeddings.new_empty(len(embeddings), dtype=torch.float32)
    each = max(features[0, 0].numel(), GRID**2)
    for some, parts in chunks_of_images(counts, each, features.device):
        logits = pair_logits(embeddings[some], features, parts)
        points = grid_points(enclosing_boxes(logits > 0, masks.boxes[targets[some]], masks.size)).to(features)
        predicted = F.grid_sample(logits.unsqueeze(1), 2 * points.unsqueeze(2) - 1, align_corners=False)[:, 0, :, 0] > 0
        target = masks.sample(targets[some], points) >= 0.5
        found[some] = (predicted & target).sum(1) / (predicted | target).sum(1).clamp(min=1)
    return found


def enclosing_boxes(inside: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The smallest box (m, 4) around each mask (m, h, w) and box (m, 4) in pixels of `size`: x0, y0, x1, y1 in [0, 1].

    A cell of a mask extends to the centres of its neighbours, as far as bilinear interpolation of its value does.
    """
    ends = []
    for axis, side in ((1, size[1]), (2, size[0])):
        cells = inside.any(axis).to(torch.uint8)  # (m, w), then (m, h)
        count, some = cells.shape[1], cells.amax(1).bool()
        first, last = (cells.argmax(1) - 0.5) / count, (count - cells.flip(1).argmax(1) + 0.5) / count
        low, high = boxes[:, axis - 1] / side, boxes[:, axis + 1] / side
        ends.append((torch.where(some, first.minimum(low), low), torch.where(some, last.maximum(high), high)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1).clamp(0, 1)


def grid_points(boxes: Tensor) -> Tensor:
    """The centres of `GRID` x `GRID` cells of each box (m, 4) -> points (m, P, 2), x and y."""
    steps = (torch.arange(GRID, device=boxes.device) + 0.5) / GRID
    places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)  # (P, 2)
    return torch.lerp(boxes[:, None, :2], boxes[:, None, 2:], places)
