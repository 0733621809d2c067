"""The binary masks of a batch, stored as bitmaps of their own boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
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

    def sample(self, which: Tensor, points: Tensor, own: Tensor | None = None) -> Tensor:
        """Bilinear values of masks `which` (M,) at points (M, P, 2), x and y in [0, 1] -> (M, P) in [0, 1].

        With `own` (M,) the points of mask m are points[own[m]]. Equal to torch's grid_sample(align_corners=False,
        padding_mode="zeros") on the dense masks.
        """
        values = points.new_empty(len(which), points.shape[1])
        for rows in chunks(len(which), points.shape[1], points.device):
            self._sample(which[rows], points[rows if own is None else own[rows]], values[rows])
        return values

    def sample_images(self, counts: Sequence[int], points: Tensor) -> list[Tensor]:
        """Sample all masks of each image at that image's points: counts [N_b], points (B, P, 2) -> [(N_b, P)]."""
        which = torch.arange(sum(counts), device=points.device)
        images = torch.arange(len(counts), device=points.device)
        own = torch.cat([image.expand(count) for image, count in zip(images, counts, strict=True)])
        return list(self.sample(which, points, own).split(list(counts)))

    def _sample(self, which: Tensor, points: Tensor, values: Tensor) -> None:
        """Sample masks `which` into `values`; positions are in pixels from the bitmap's corner."""
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
"""Values processed at once: what fits a CPU's caches, and what keeps an accelerator busy."""


def chunks(count: int, each: int, device: torch.device) -> list[slice]:
    """Split `count` rows of `each` values into slices that the device processes at once."""
    size = max(1, VALUES_AT_ONCE["cpu" if device.type == "cpu" else "accelerator"] // max(1, each))
    return [slice(start, start + size) for start in range(0, count, size)]


def chunks_of_images(
    counts: Sequence[int], each: int, device: torch.device
) -> list[tuple[slice, list[tuple[int, slice]]]]:
    """As `chunks`, for rows that are ordered by image, counts[b] of image b.

    Returns for every chunk its rows, and for every image in it the rows of that image, counted from the chunk's first.
    """
    ends = list(accumulate(counts))
    found = []
    for rows in chunks(ends[-1], each, device):
        stop = min(rows.stop, ends[-1])
        parts = []
        for image, (count, end) in enumerate(zip(counts, ends, strict=True)):
            first, last = max(end - count, rows.start), min(end, stop)
            if first < last:
                parts.append((image, slice(first - rows.start, last - rows.start)))
        found.append((slice(rows.start, stop), parts))
    return found


def pair_logits(embeddings: Tensor, features: Tensor, parts: Sequence[tuple[int, slice]]) -> Tensor:
    """Mask logits of pairs of query and image: embeddings (M, C), features (B, C, h, w) -> (M, h, w).

    `parts`: the rows of each image, which together are all rows. Not differentiable.
    """
    logits = embeddings.new_empty(len(embeddings), *features.shape[-2:])
    for image, rows in parts:
        torch.mm(embeddings[rows], features[image].flatten(1), out=logits[rows].flatten(1))
    return logits
