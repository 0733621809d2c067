"""One image ready to be collated, and what can be done with it: instances of another pasted in, small ones dropped."""

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from m2f_trainer.data import rle
from m2f_trainer.data.views import Size, trim


class Sample(TypedDict):
    """One image ready for `collate`, all in the padded frame (H, W) but for the two sizes."""

    pixel_values: torch.Tensor  # uint8 (3, H, W), not normalised, 0 in the padding
    pixel_mask: torch.Tensor  # bool (H, W), False in the padding
    masks: list[rle.Bitmap]  # N bitmaps (y1 - y0, x1 - x0) of zeros and ones, cropped to their boxes
    boxes: torch.Tensor  # int32 (N, 4)
    category_ids: torch.Tensor  # int64 (N,), the annotation file's own
    image_id: int
    original_size: Size
    resized_size: Size


def paste(sample: Sample, other: Sample, chosen: npt.NDArray[np.bool_]) -> Sample:
    """Simple copy-paste (Ghiasi et al., 2021): the chosen instances of `other` (N,) lie on top of the sample.

    What they cover is taken from the sample's own instances; nothing is pasted into the padding.
    """
    valid = sample["pixel_mask"].numpy()
    pixels = sample["pixel_values"].clone()
    top = np.zeros(valid.shape, dtype=np.bool_)
    pasted: list[tuple[int, rle.Box, rle.Bitmap]] = []
    for k in np.flatnonzero(chosen).tolist():
        x0, y0, x1, y1 = other["boxes"][k].tolist()
        seen = trim((other["masks"][k] != 0) & valid[y0:y1, x0:x1], (x0, y0, x1, y1))
        if seen is not None:
            top[y0:y1, x0:x1] |= (other["masks"][k] != 0) & valid[y0:y1, x0:x1]
            pasted.append((int(other["category_ids"][k]), *seen))
    if not pasted:
        return sample
    covered = torch.from_numpy(top)
    pixels[:, covered] = other["pixel_values"][:, covered]
    below = []
    for category, (x0, y0, x1, y1), bitmap in _instances(sample):
        left = trim((bitmap != 0) & ~top[y0:y1, x0:x1], (x0, y0, x1, y1))
        if left is not None:
            below.append((category, *left))
    return _with_instances({**sample, "pixel_values": pixels}, [*below, *pasted])


def at_least(area: int, sample: Sample) -> Sample:
    """The sample without instances of fewer than `area` pixels."""
    large = [one for one in _instances(sample) if int(one[2].sum()) >= area]
    return sample if len(large) == len(sample["masks"]) else _with_instances(sample, large)


def _instances(sample: Sample) -> list[tuple[int, rle.Box, rle.Bitmap]]:
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in sample["boxes"].tolist()]
    return list(zip(sample["category_ids"].tolist(), boxes, sample["masks"], strict=True))


def _with_instances(sample: Sample, instances: Iterable[tuple[int, rle.Box, rle.Bitmap]]) -> Sample:
    found = list(instances)
    return {
        **sample,
        "masks": [bitmap for _, _, bitmap in found],
        "boxes": torch.tensor([box for _, box, _ in found], dtype=torch.int32).reshape(-1, 4),
        "category_ids": torch.tensor([category for category, _, _ in found], dtype=torch.int64),
    }
