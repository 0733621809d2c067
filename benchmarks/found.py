"""Predictions to post-process and to score: the masks of a dataset's annotations, or drawn ellipses without one."""

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
    """Whole masks (H, W) one after another, and again from the start: of the dataset's training split, or ellipses."""
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
    """Mask logits (1, Q, h, w) of size (h, w), as a trained model gives them: masks with soft edges, -8 to 8.

    `inside` is the part of (h, w) that is no padding.
    """
    logits = torch.full((queries, *size), -8.0)
    for logit, mask in zip(logits, islice(masks_of(dataset), queries), strict=True):
        small = functional.interpolate(torch.from_numpy(mask)[None, None].float(), inside, mode="area")[0, 0]
        logit[: inside[0], : inside[1]] = 16 * small - 8
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (logits + 0.5 * noise).unsqueeze(0)


def class_logits(queries: int) -> Tensor:
    """(1, Q, K + 1)."""
    return 3 * torch.randn(1, queries, len(CATEGORIES) + 1, generator=torch.Generator().manual_seed(1))


def nudged(mask: Mask, rng: np.random.Generator) -> Mask:
    """The mask moved by up to 8 pixels a side, as a prediction that is not quite right."""
    down, right = rng.integers(-8, 9, 2).tolist()
    moved: Mask = np.roll(mask, (down, right), axis=(0, 1))
    return moved
