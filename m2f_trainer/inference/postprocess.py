"""Convert mask logits to COCO run lengths at the original size, without storing full-size masks.

Resizing to the padded frame, cropping the padding and resizing to the original frame are linear and separable, so they
compose into one operator per axis: every output row is a weighted sum of at most four logit rows. The weights are
convex, so a mask's pixels can only depend on its positive logits, and only the block that these reach is computed.
Blocks are column-major, as COCO's run lengths are; only the positions of value changes are copied to the host.

Weighted sums go through `embedding_bag`: exact float32 on every device, not affected by autocast and TF32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.masks.rle import Box, Size, encode_runs, runs_of_changes, union

TOP_K = 100
"""(query, class) pairs of an image that the original Mask2Former keeps, and that the metrics count."""

Pairs = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]
"""Probability, class and query of k pairs, (k,) each."""


@torch.no_grad()
def to_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    image_ids: Sequence[int] | Tensor,
    original_sizes: Sequence[Size] | Tensor,
    resized_sizes: Sequence[Size] | Tensor,
    padded_size: Size,
    category_ids: Sequence[int],
    top_k: int = TOP_K,
    threshold: float = 0.0,
) -> list[Instances]:
    """The `top_k` best (query, class) pairs of each image as Instances, as in the original Mask2Former.

    Computed on the device of the logits; only classes, mask boundaries and scores are copied to the host. A pair whose
    mask is empty scores 0 and keeps its empty mask. A NaN score counts as 0.

    Args:
        class_logits: (B, Q, K+1), the last one being "no object".
        mask_logits: (B, Q, h, w) in the logits frame, which covers the padded frame.
        image_ids: B ids.
        original_sizes: B sizes (H, W) of the original images.
        resized_sizes: B sizes (H, W) of the images within the padded frame, at its top left.
        padded_size: (H, W) of the network's input.
        category_ids: K ids: class k of the model is the dataset's category `category_ids[k]`.
        threshold: pairs that can't score above it are dropped before their masks are computed; 0 drops none.
    """
    ids, originals, resized = (_to_list(value) for value in (image_ids, original_sizes, resized_sizes))
    pairs = _best_pairs(class_logits, top_k, threshold)
    dtype = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    return [
        _image_instances(
            mask_logits[index].to(dtype),
            pairs[index],
            int(ids[index]),
            ((originals[index][0], originals[index][1]), (resized[index][0], resized[index][1]), padded_size),
            np.asarray(category_ids, np.int64),
        )
        for index in range(len(ids))
    ]


def most_instances(num_queries: int) -> int:
    """How many instances of an image or tile are kept without an official limit: one for each query, at least 100."""
    return max(TOP_K, num_queries)


def _to_list(values: Sequence[Any] | Tensor) -> list[Any]:
    return list(values.tolist()) if isinstance(values, Tensor) else list(values)


def _best_pairs(class_logits: Tensor, top_k: int, threshold: float) -> list[Pairs]:
    """The best pairs of each image, at most `top_k`, from (B, Q, K+1) logits."""
    dtype = torch.float64 if class_logits.dtype == torch.float64 else torch.float32
    probabilities = class_logits.to(dtype).softmax(-1)[..., :-1]
    num_classes = probabilities.shape[-1]
    pairs = probabilities.flatten(1)  # (B, Q*K)
    best, index = (values.cpu().numpy() for values in pairs.topk(min(top_k, pairs.shape[1]), dim=1))
    kept = best > threshold if threshold else np.ones(best.shape, np.bool_)
    return [
        (one[keep].astype(np.float64), places[keep] % num_classes, places[keep] // num_classes)
        for one, places, keep in zip(best, index, kept, strict=True)
    ]


def _image_instances(
    mask_logits: Tensor,
    pairs: Pairs,
    image_id: int,
    sizes: tuple[Size, Size, Size],
    category_ids: NDArray[np.int64],
) -> Instances:
    """One image: (Q, h, w) logits and its best pairs; `sizes` are its original, resized and padded (H, W)."""
    probabilities, classes, queries = pairs
    unique, position = np.unique(queries, return_inverse=True)
    mask_scores, runs = mask_runs(mask_logits, unique, *sizes)
    encoded = [{"size": list(sizes[0]), "counts": counts} for counts in encode_runs(runs)]
    boxes = tight_boxes(encoded)
    scores = np.nan_to_num(probabilities * mask_scores[position])
    order = np.argsort(-scores, kind="stable")
    rles = [encoded[index] for index in position[order]]
    return Instances(
        image_id, category_ids[classes[order]], scores[order], rles, boxes[position[order]].reshape(-1, 4), sizes[0]
    )


PIXELS_AT_ONCE = {"cpu": 2**20, "accelerator": 2**23}
"""Pixels rendered at once, about 10 bytes each: enough to fit a CPU's cache, or to fill an accelerator."""


@dataclass(frozen=True, eq=False)
class Axis:
    """The operator of one axis: output i is sum_t weight[i, t] * input[index[i, t]], of shape (outputs, taps) each."""

    index: NDArray[np.int64]
    weight: NDArray[np.float64]

    def reach(self, low: int, high: int) -> tuple[int, int]:
        """The outputs start:stop that depend on any of the inputs low:high."""
        start = int(np.searchsorted(self.index[:, -1], low, "left"))
        stop = int(np.searchsorted(self.index[:, 0], high - 1, "right"))
        return start, max(start, stop)

    def part(self, start: int, stop: int, like: Tensor) -> tuple[int, int, Tensor, Tensor]:
        """The inputs low:high that outputs start:stop need, with index (from low) and weight, (stop - start, taps)."""
        index = self.index[start:stop]
        low, high = int(index[0, 0]), int(index[-1, -1]) + 1
        weight = torch.from_numpy(self.weight[start:stop]).to(like.device, like.dtype)
        return low, high, torch.from_numpy(index - low).to(like.device), weight


def _bilinear(inputs: int, outputs: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Index and weight, (outputs, 2), of `F.interpolate(mode="bilinear", align_corners=False)` along one axis."""
    source = np.maximum((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0.0)
    low = np.minimum(np.floor(source).astype(np.int64), inputs - 1)
    fraction = source - low
    return np.stack([low, np.minimum(low + 1, inputs - 1)], 1), np.stack([1 - fraction, fraction], 1)


@lru_cache(maxsize=256)
def axis_operator(logits: int, padded: int, resized: int, original: int) -> Axis:
    """Two bilinear steps with a crop between them, logits -> padded[:resized] -> original, as one operator."""
    outer_index, outer_weight = _bilinear(resized, original)
    inner_index, inner_weight = _bilinear(logits, padded)
    index = inner_index[outer_index].reshape(original, 4)
    weight = (outer_weight[:, :, None] * inner_weight[outer_index]).reshape(original, 4)
    first = index.min(1, keepdims=True)
    taps = int((index - first).max()) + 1
    merged = np.zeros((original, taps))
    np.add.at(merged, (np.arange(original)[:, None], index - first), weight)
    return Axis(np.minimum(first + np.arange(taps), logits - 1), merged)


def mask_runs(
    mask_logits: Tensor, queries: NDArray[np.int64], original: Size, resized: Size, padded: Size
) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """Mean mask probability inside each mask, (n,), and the n masks' run lengths at the original size.

    Args:
        mask_logits: (Q, h, w) of one image, float32 or float64.
        queries: (n,) indices of the queries.
    """
    frame = original[0] * original[1]
    height, width = mask_logits.shape[-2:]
    rows = axis_operator(height, padded[0], resized[0], original[0])
    columns = axis_operator(width, padded[1], resized[1], original[1])
    boxes = _output_boxes(mask_logits, queries, rows, columns)
    runs = [np.array([frame], np.int64)] * len(queries)
    members: list[int] = []
    totals: list[Tensor] = []
    limit = PIXELS_AT_ONCE["cpu" if mask_logits.device.type == "cpu" else "accelerator"]
    for group in _groups(boxes, 1 if mask_logits.device.type == "cpu" else max(1, limit // frame)):
        box = union(box for member in group if (box := boxes[member]))
        changes, total = _group_changes(_chosen(mask_logits, queries[group]), box, rows, columns, limit)
        for member, positions in zip(group, changes, strict=True):
            runs[member] = runs_of_changes(positions, frame)
        members.extend(group)
        totals.append(total)
    sums = np.zeros(len(queries))
    if members:
        sums[members] = torch.cat(totals).double().cpu().numpy()
    areas = np.array([run[1::2].sum() for run in runs], np.float64)
    return sums / (areas + 1e-6), runs


def _output_boxes(mask_logits: Tensor, queries: NDArray[np.int64], rows: Axis, columns: Axis) -> list[Box | None]:
    """The block of the original frame that the positive logits of each query can reach; None where there is none."""
    highest = torch.cat([mask_logits.amax(2), mask_logits.amax(1)], 1)  # (Q, h + w)
    host = ~(highest <= 0).cpu().numpy()[queries]  # NaN counts as positive
    height = mask_logits.shape[1]
    boxes: list[Box | None] = []
    for row in host:
        ys, xs = np.flatnonzero(row[:height]), np.flatnonzero(row[height:])
        if not len(ys):
            boxes.append(None)
            continue
        y0, y1 = rows.reach(int(ys[0]), int(ys[-1]) + 1)
        x0, x1 = columns.reach(int(xs[0]), int(xs[-1]) + 1)
        boxes.append((x0, y0, x1, y1) if y0 < y1 and x0 < x1 else None)
    return boxes


def _groups(boxes: Sequence[Box | None], size: int) -> Iterator[list[int]]:
    """The queries that have a box, `size` at a time: 1 on a CPU, where small blocks are faster."""
    present = [member for member, box in enumerate(boxes) if box is not None]
    for start in range(0, len(present), size):
        yield present[start : start + size]


def _chosen(mask_logits: Tensor, queries: NDArray[np.int64]) -> Tensor:
    """(g, h, w); a view where g is 1."""
    if len(queries) == 1:
        return mask_logits[int(queries[0])][None]
    return mask_logits[torch.from_numpy(queries).to(mask_logits.device)]


def _group_changes(
    mask_logits: Tensor, box: Box, rows: Axis, columns: Axis, limit: int
) -> tuple[list[NDArray[np.int64]], Tensor]:
    """`_changes` of (g, h, w) logits within `box`, in strips of columns of at most `limit` pixels."""
    x0, y0, x1, y1 = box
    top, bottom, index, weight = rows.part(y0, y1, mask_logits)
    left, right = int(columns.index[x0, 0]), int(columns.index[x1 - 1, -1]) + 1
    table = _weighted_rows(mask_logits[:, top:bottom, left:right], index, weight)  # (g, Y, right - left)
    table = table.transpose(1, 2).contiguous()  # (g, right - left, Y)
    step = max(1, limit // (table.shape[0] * table.shape[2]))
    strips, totals = [], []
    for x in range(x0, x1, step):
        low, high, index, weight = columns.part(x, min(x + step, x1), table)
        block = _weighted_rows(table[:, low - left : high - left], index, weight)  # (g, X, Y)
        changes, total = _changes(block, x, y0, len(rows.index))
        strips.append(changes)
        totals.append(total)
    return [np.concatenate(parts) for parts in zip(*strips, strict=True)], torch.stack(totals).sum(0)


def _weighted_rows(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(g, n, m) -> (g, outputs, m): output i is sum_t weight[i, t] * values[:, index[i, t]]."""
    group, inputs, width = values.shape
    if group > 1:
        offsets = torch.arange(group, device=index.device) * inputs
        index = (index + offsets[:, None, None]).flatten(0, 1)  # (g*outputs, taps)
        weight = weight.repeat(group, 1)
    table = values.reshape(group * inputs, width).contiguous()
    return functional.embedding_bag(index, table, mode="sum", per_sample_weights=weight).view(group, -1, width)


def _changes(block: Tensor, x0: int, y0: int, height: int) -> tuple[list[NDArray[np.int64]], Tensor]:
    """Positions at which each mask of a (g, X, Y) block changes in the column-major original frame, and the summed
    probability inside each, (g,). Overwrites the block.

    Every column is followed by one background cell, which ends a run at its bottom; `runs_of_changes` joins runs
    that continue at the top of the next column.
    """
    group, width, rows = block.shape
    stride = rows + 1
    flat = torch.zeros((group, width * stride + 1), dtype=torch.bool, device=block.device)
    flat[:, 1:].view(group, width, stride)[:, :, :rows].copy_(block > 0)
    total = functional.threshold(block, 0.0, -math.inf, inplace=True).sigmoid_().sum((1, 2))
    member, position = _edges(flat)
    position = (x0 + position // stride) * height + y0 + position % stride
    return np.split(position, np.searchsorted(member, np.arange(1, group))), total


def _edges(flat: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each cell of a (g, n) bool matrix whose right neighbour differs. numpy is faster on a CPU."""
    if flat.device.type != "cpu":
        row, column = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy().T
        return row, column
    cells = flat.numpy()
    row, column = np.divmod(np.flatnonzero(cells[:, 1:] != cells[:, :-1]), cells.shape[1] - 1)
    return row, column
