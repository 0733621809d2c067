"""Synthetic predictions to post-process and score, from the masks of a dataset's annotations or from ellipses."""

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.stock import CATEGORIES, scene
from m2f_trainer.data.collate import unpack_masks
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.masks.segmentation import decode

Mask = NDArray[np.uint8]


def masks_of(dataset: Path | None) -> Iterator[Mask]:
    """Masks (H, W) of the dataset's training split, or ellipses, in an endless cycle."""
    if dataset is None:
        batch, _ = scene(1, 512, 100, dense=False)
        return cycle(list(unpack_masks(batch["mask_labels"], 512, 512).numpy()))
    rows = load_coco(str(dataset))["train"]
    return cycle(
        decode(entry["counts"], row["height"], row["width"])
        for row in rows
        for entry in row["objects"]
        if not entry["iscrowd"]
    )


def logits_of(dataset: Path | None, queries: int, size: tuple[int, int], inside: tuple[int, int]) -> Tensor:
    """Mask logits (1, Q, h, w) like those of a trained model: masks with soft edges, -8 to 8, and noise.

    `size` is (h, w), and `inside` the part of it that is not padding.
    """
    logits = torch.full((queries, *size), -8.0)
    for logit, mask in zip(logits, islice(masks_of(dataset), queries), strict=True):
        small = functional.interpolate(torch.from_numpy(mask)[None, None].float(), inside, mode="area")[0, 0]
        logit[: inside[0], : inside[1]] = 16 * small - 8
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (logits + 0.5 * noise).unsqueeze(0)


def class_logits(queries: int) -> Tensor:
    """Random class logits (1, Q, K + 1)."""
    return 3 * torch.randn(1, queries, len(CATEGORIES) + 1, generator=torch.Generator().manual_seed(1))


def nudged(mask: Mask, rng: np.random.Generator) -> Mask:
    """The mask moved by up to 8 pixels in x and in y, like an imprecise prediction."""
    down, right = rng.integers(-8, 9, 2).tolist()
    moved: Mask = np.roll(mask, (down, right), axis=(0, 1))
    return moved
