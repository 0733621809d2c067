"""How good each predicted mask is: a small head that predicts a mask's IoU with its object, to rank predictions by.

The idea of Mask Scoring R-CNN (Huang et al. 2019, https://arxiv.org/abs/1903.00241): the class head tells whether there
is an object, and nothing in its loss tells how well the mask fits.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .compact_masks import CompactMasks, chunks
from .initialization import init_class_head

MEASURES, WIDTH = 5, 32
LITTLE = 1e-3
GRID = 48
"""Points a side of the grid in which an IoU is measured."""


class QualityHead(nn.Module):
    """Logits of each mask's IoU, by a small MLP on five measures of the mask (see `measures`).

    Measures generalise where embeddings remember the training images. Nothing flows back from here: trunk, class head
    and masks train as they would without this head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(MEASURES, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.score = nn.Linear(WIDTH, 1)

    def start(self) -> None:
        """torch's default, and a score of 0: a head that is new in a trained model leaves the order as it was."""
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


@torch.no_grad()
def measures(mask_logits: Tensor, features: Tensor) -> Tensor:
    """What tells how well a mask fits: mask logits (B, Q, h, w), mask features (B, C, h, w) -> float32 (B, Q, 5).

    The area; the mean probability inside; how little the mask changes with the threshold (Segment Anything's stability
    score, Kirillov et al. 2023, https://arxiv.org/abs/2304.02643); the length of the mean unit feature inside; and the
    mean cosine to it in a ring of one cell around the mask, which is high where the mask ends within its object.
    """
    with torch.autocast(features.device.type, enabled=False):
        logits = mask_logits.float()
        inside = logits.sigmoid()
        hard = (logits > 0).float().flatten(2)  # (B, Q, h x w)
        ring = (F.max_pool2d(inside, 3, stride=1, padding=1) - inside).flatten(2)
        stable = (logits > 1).float().flatten(2).sum(-1) / (logits > -1).float().flatten(2).sum(-1).clamp(min=1)
        inside = inside.flatten(2)
        area = inside.sum(-1)
        unit = F.normalize(features.float().flatten(2), dim=1).transpose(1, 2)  # (B, h x w, C)
        mean = inside @ unit / (area + LITTLE).unsqueeze(-1)  # (B, Q, C)
        around = ring @ unit / (ring.sum(-1) + LITTLE).unsqueeze(-1)
        alike = mean.norm(dim=-1)
        beyond = (mean * around).sum(-1) / (alike + LITTLE)
        firm = (inside * hard).sum(-1) / hard.sum(-1).clamp(min=1)
        return torch.stack([(area + LITTLE).log() / 4, firm, stable, alike, beyond], -1)


def quality_losses(
    quality_logits: Tensor,
    embeddings: Tensor,
    features: Tensor,
    masks: CompactMasks,
    counts: Sequence[int],
    points: Tensor,
) -> Tensor:
    """Binary cross entropy of every query's predicted IoU to the IoU of its mask with the object it fits best: (B, Q).

    quality_logits (B, Q), embeddings (B, Q, D), features (B, D, h, w), `counts` of the batch's masks an image, points
    (B, P, 2) in [0, 1] at which the object is chosen. Without objects the IoU is 0.
    """
    sampled = F.grid_sample(features, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)  # (B, D, P)
    truth, start = torch.zeros_like(quality_logits, dtype=torch.float32), 0
    for image, count in enumerate(counts):
        if count:
            objects = torch.arange(start, start + count, device=points.device)
            theirs = (masks.sample(objects, points[image].expand(count, -1, -1)) >= 0.5).to(sampled)  # (N, P)
            ours = (embeddings[image] @ sampled[image] > 0).to(sampled)  # (Q, P)
            common = ours @ theirs.T
            best = objects[(common / (ours.sum(1, True) + theirs.sum(1) - common).clamp(min=1)).argmax(1)]
            truth[image] = overlaps(embeddings[image], features[image], masks, best)
        start += count
    return F.binary_cross_entropy_with_logits(quality_logits.float(), truth, reduction="none")


@torch.no_grad()
def overlaps(embeddings: Tensor, features: Tensor, masks: CompactMasks, targets: Tensor) -> Tensor:
    """IoU of one image's predicted masks with objects, (M,): pair m is embeddings[m] of (M, D) and mask targets[m].

    features (D, h, w). Both masks are read at a grid of points in the smallest box around the two, so that a small
    object is measured as exactly as a large one.
    """
    found = embeddings.new_empty(len(embeddings))
    for some in chunks(len(embeddings), max(features[0].numel(), GRID**2), features.device):
        logits = (embeddings[some] @ features.flatten(1)).view(-1, *features.shape[1:])
        points = grid(around(logits > 0, masks.boxes[targets[some]], masks.size)).to(features)
        ours = F.grid_sample(logits.unsqueeze(1), 2 * points.unsqueeze(2) - 1, align_corners=False)[:, 0, :, 0] > 0
        theirs = masks.sample(targets[some], points) >= 0.5
        found[some] = (ours & theirs).sum(1) / (ours | theirs).sum(1).clamp(min=1)
    return found


def around(inside: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The smallest box (m, 4) around each mask (m, h, w) and box (m, 4) in pixels of `size`: x0, y0, x1, y1 in [0, 1].

    A cell of a mask reaches to the centres of its neighbours, as far as bilinear values of it do.
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


def grid(boxes: Tensor) -> Tensor:
    """The centres of `GRID` x `GRID` cells of each box (m, 4) -> points (m, P, 2), x and y."""
    steps = (torch.arange(GRID, device=boxes.device) + 0.5) / GRID
    places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)  # (P, 2)
    return torch.lerp(boxes[:, None, :2], boxes[:, None, 2:], places)
