"""Hungarian matching of all decoder outputs at once, and the targets it matches, kept as compact bitmaps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class CompactMasks:
    """The T binary masks of a batch, each as a bitmap of its own box: memory follows the objects' area.

    values  uint8 (V,), 0 or 1: all bitmaps one after another, row by row
    boxes   int64 (T, 4): x0, y0, x1, y1 of each bitmap in the padded frame; the outermost rows and columns of a bitmap
            are zero (they may lie one pixel outside the frame), so that a point outside reads the border's zero
    offsets int64 (T,): where each bitmap starts in `values`
    size    (H, W) of the padded frame
    """

    values: Tensor
    boxes: Tensor
    offsets: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, labels: Mapping[str, Tensor] | Sequence[Tensor], size: Sequence[int]) -> "CompactMasks":
        """Take a batch's `mask_labels`: the fields above, or dense masks; `size` is (H, W) of the padded frame."""
        if not isinstance(labels, Mapping):
            return cls.from_dense(labels)
        height, width = size
        return cls(labels["values"], labels["boxes"].long(), labels["offsets"].long(), (height, width))

    @classmethod
    def from_dense(cls, masks: Sequence[Tensor]) -> "CompactMasks":
        """Take dense masks, one (N, H, W) an image, as transformers' models do."""
        dense = torch.cat([F.pad(mask.to(torch.uint8), (1, 1, 1, 1)) for mask in masks])
        count, height, width = dense.shape
        box = torch.tensor([-1, -1, width - 1, height - 1], device=dense.device)
        starts = torch.arange(count, device=dense.device) * (height * width)
        return cls(dense.flatten(), box.expand(count, 4), starts, (height - 2, width - 2))

    def sample(self, which: Tensor, points: Tensor) -> Tensor:
        """Bilinear values of masks `which` (M,) at points (M, P, 2), x and y in [0, 1] -> (M, P) in [0, 1].

        Equal to torch's grid_sample(align_corners=False, padding_mode="zeros") on the dense masks.
        """
        values = points.new_empty(points.shape[:-1])
        for rows in portions(len(which), points.shape[1], points.device):
            self._sample(which[rows], points[rows], values[rows])
        return values

    def _sample(self, which: Tensor, points: Tensor, values: Tensor) -> None:
        """`sample` of some masks into `values`, the places counted in pixels from the bitmap's edge."""
        boxes, start = self.boxes[which], self.offsets[which].unsqueeze(1)
        sides = boxes[:, 2:] - boxes[:, :2]  # (m, 2)
        last = (sides - 1).unsqueeze(1).to(points)
        frame = torch.cat([points.new_full((1,), side) for side in self.size[::-1]])  # filled on the device
        place = (points * frame).sub_(boxes[:, None, :2] + 0.5)
        place = torch.minimum(place.clamp_(min=0), last, out=place)
        first = torch.minimum(place.floor(), last - 1)
        x, y = place.sub_(first).unbind(-1)
        kind = torch.int32 if len(self.values) < 2**31 else torch.int64
        width = sides[:, :1].to(kind)
        column, row = first.to(kind).unbind(-1)
        index = torch.addcmul(start.to(kind) + column, row, width)  # of the upper left pixel, (m, P)
        upper = torch.lerp(self._read(index, values), self._read(index + 1, values), x)
        index += width
        lower = torch.lerp(self._read(index, values), self._read(index + 1, values), x)
        torch.lerp(upper, lower, y, out=values)

    def _read(self, index: Tensor, like: Tensor) -> Tensor:
        return self.values.index_select(0, index.flatten()).view_as(index).to(like.dtype)


VALUES_AT_ONCE = {"cpu": 2**20, "accelerator": 2**25}
"""Numbers worked on at once: what a CPU's caches hold, what keeps an accelerator busy."""


def portions(count: int, each: int, device: torch.device) -> list[slice]:
    """Slices of `count` rows of `each` numbers that the device takes at once."""
    size = max(1, VALUES_AT_ONCE["cpu" if device.type == "cpu" else "accelerator"] // max(1, each))
    return [slice(start, start + size) for start in range(0, count, size)]


@dataclass(frozen=True)
class Matches:
    """The M matched pairs of all L decoder outputs, ordered by image; each tensor is int64 (M,)."""

    level: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index into the batch's T targets
    per_image: list[int]  # how many of the M pairs each image has, known without asking the device


@torch.no_grad()
def pair_costs(
    logits: Tensor, probabilities: Tensor, targets: Tensor, classes: Tensor, weights: Mapping[str, float]
) -> Tensor:
    """Cost of giving each query each target, for all outputs of one image -> (L, Q, N).

    logits (L, Q, P) and targets (N, P) at the same points, probabilities (L, Q, K + 1), classes (N,). As the original
    matcher (Cheng et al. 2022, https://arxiv.org/abs/2112.01527, and its matcher.py): weighted sum of -p(class), mean
    binary cross entropy, and dice. With x the logit and t the target, the cross entropy is softplus(x) - x t.
    """
    costs = logits.new_empty(*logits.shape[:2], len(targets))
    area, points = targets.sum(-1), logits.shape[-1]
    for some in portions(len(logits), logits[0].numel(), logits.device):
        x = logits[some]
        inside = x.sigmoid()
        cross_entropy = (F.softplus(x).sum(-1, keepdim=True) - x @ targets.T) / points
        dice = 1 - (2 * (inside @ targets.T) + 1) / (inside.sum(-1, keepdim=True) + area + 1)
        unlikely = -probabilities[some][..., classes]
        costs[some] = weights["mask"] * cross_entropy + weights["class"] * unlikely + weights["dice"] * dice
    return costs


@torch.no_grad()
def match(
    embeddings: Tensor,
    features: Tensor,
    class_logits: Tensor,
    masks: CompactMasks,
    class_labels: Sequence[Tensor],
    points: Tensor,
    weights: Mapping[str, float],
) -> Matches:
    """Match every decoder output to the targets, with one copy to the host and one back.

    embeddings (L, B, Q, C), features (B, C, h, w), class_logits (L, B, Q, K + 1), points (B, P, 2) in [0, 1]: queries
    and targets of an image are compared at the same points, shared by all outputs. Costs are float32 also under
    autocast. Non-finite costs are matched last, as transformers does.
    """
    sampled = F.grid_sample(features, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)  # (B, C, P)
    probabilities = class_logits.softmax(-1)
    costs, start = [], 0
    for image, classes in enumerate(class_labels):
        count = len(classes)
        if count:
            which = torch.arange(start, start + count, device=points.device)
            truth = masks.sample(which, points[image].expand(count, -1, -1))
            logits = (embeddings[:, image].flatten(0, 1) @ sampled[image]).unflatten(0, (len(embeddings), -1))
            costs.append(pair_costs(logits, probabilities[:, image], truth, classes, weights))
        start += count
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
