"""A slow, literal implementation of Mask2Former's postprocessing as a reference, and logits to test with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def original_route(
    class_logits: Tensor,
    mask_logits: Tensor,
    original: tuple[int, int],
    resized: tuple[int, int],
    padded: tuple[int, int],
    top_k: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask2Former's inference of one image, written plainly: classes, queries, scores, logits (k, H, W)."""
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best, index = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    upsampled = functional.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    cropped = upsampled[:, :, : resized[0], : resized[1]]
    logits = functional.interpolate(cropped, original, mode="bilinear", align_corners=False)[0][index // num_classes]
    inside = (logits > 0).to(logits.dtype)
    quality = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return index % num_classes, index // num_classes, best * quality, logits


def blob_logits(queries: int, height: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(Q, h, w) of smooth blobs of many sizes; every seventh has no positive logit, every eleventh is specks."""
    generator = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:height, 0:width]
    maps = np.empty((queries, height, width))
    for query in range(queries):
        cy, cx = generator.uniform(0, height), generator.uniform(0, width)
        ry, rx = generator.uniform(1, height / 2), generator.uniform(1, width / 2)
        distance = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2
        maps[query] = 4 * (1 - distance).clip(-2) + generator.normal(0, 0.3, (height, width))
        if query % 7 == 6:
            maps[query] = -1 - np.abs(maps[query])
        if query % 11 == 10:
            maps[query] = np.where(generator.random((height, width)) < 0.01, 2.0, -3.0)
    return torch.from_numpy(maps).to(dtype)
