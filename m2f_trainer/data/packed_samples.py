"""Training samples as bytes, so that they can be kept in a file instead of being made from image and masks again.

    unpack_sample(pack_sample(sample))  # the same sample

The format is numpy's npz without compression. Reading it executes no code.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def pack_sample(sample: Mapping[str, Any]) -> bytes:
    """A sample of `InstanceDataset`; masks take a bit per pixel of their boxes."""
    bitmaps = [np.asarray(one, np.uint8).reshape(-1) for one in sample["masks"]]
    arrays = {
        "pixels": sample["pixel_values"].numpy(),
        "valid": np.packbits(sample["pixel_mask"].numpy()),
        "masks": np.packbits(np.concatenate(bitmaps) if bitmaps else np.zeros(0, np.uint8)),
        "boxes": sample["boxes"].numpy(),
        "classes": sample["class_labels"].numpy(),
        "image": np.array([sample["image_id"], *sample["original_size"], *sample["resized_size"]]),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpack_sample(packed: bytes) -> dict[str, Any]:
    """The inverse of `pack_sample`."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        pixels, boxes, image = arrays["pixels"], arrays["boxes"], arrays["image"].tolist()
        classes, valid, masks = arrays["classes"], arrays["valid"], arrays["masks"]
    size = pixels.shape[1:]
    shapes = [(int(y1 - y0), int(x1 - x0)) for x0, y0, x1, y1 in boxes]
    ends = np.cumsum([height * width for height, width in shapes], dtype=np.int64)
    bits = np.unpackbits(masks, count=int(ends[-1]) if len(ends) else 0)
    parts = np.split(bits, ends[:-1]) if shapes else []
    return {
        "pixel_values": torch.from_numpy(pixels),
        "pixel_mask": torch.from_numpy(np.unpackbits(valid, count=size[0] * size[1]).reshape(size).view(np.bool_)),
        "masks": [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)],
        "boxes": torch.from_numpy(boxes),
        "class_labels": torch.from_numpy(classes),
        "image_id": image[0],
        "original_size": (image[1], image[2]),
        "resized_size": (image[3], image[4]),
    }
