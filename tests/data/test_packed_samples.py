"""A packed sample is the sample again."""

from typing import Any

import numpy as np
import pytest
import torch

from m2f_trainer.data.packed_samples import pack_sample, unpack_sample

BOXES = [(0, 0, 3, 2), (1, 4, 6, 8), (5, 7, 6, 8)]


def sample_of(objects: int) -> dict[str, Any]:
    """A sample of 8 x 6 pixels, the last row of them padding."""
    draw = np.random.default_rng(objects)
    valid = torch.ones(8, 6, dtype=torch.bool)
    valid[7] = False
    boxes = BOXES[:objects]
    return {
        "pixel_values": torch.from_numpy(draw.integers(0, 256, (3, 8, 6), dtype=np.uint8)),
        "pixel_mask": valid,
        "masks": [draw.integers(0, 2, (y1 - y0, x1 - x0), dtype=np.uint8) for x0, y0, x1, y1 in boxes],
        "boxes": torch.tensor(boxes, dtype=torch.int32).reshape(-1, 4),
        "class_labels": torch.arange(objects),
        "image_id": 2**40 + 1,
        "original_size": (700, 600),
        "resized_size": (7, 6),
    }


@pytest.mark.parametrize("objects", [0, 1, 3])
def test_a_packed_sample_is_the_sample_again(objects: int) -> None:
    sample = sample_of(objects)
    found = unpack_sample(pack_sample(sample))
    assert found.keys() == sample.keys()
    for name, value in sample.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        elif name == "masks":
            assert len(found[name]) == objects
            for one, expected in zip(found[name], value, strict=True):
                assert one.dtype == np.uint8
                np.testing.assert_array_equal(one, expected)
        else:
            assert found[name] == value
