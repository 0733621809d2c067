"""Masks stored as bitmaps of their boxes, against torch's sampling of dense masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f_trainer.data.collate import pack_masks
from m2f_trainer.model import compact_masks
from m2f_trainer.model.compact_masks import CompactMasks, chunks, chunks_of_images, pair_logits

BOXES = [(0, 0, 5, 4), (30, 20, 40, 32), (7, 9, 8, 10), (0, 3, 40, 32), (35, 0, 40, 2)]
"""In a frame of 32 x 40: at both corners, one pixel, a whole side."""


def masks_of_random_boxes() -> tuple[CompactMasks, torch.Tensor]:
    """The same five masks as bitmaps of their boxes and as a dense stack."""
    rng = np.random.default_rng(0)
    bitmaps = [rng.integers(0, 2, (y1 - y0, x1 - x0), dtype=np.uint8) for x0, y0, x1, y1 in BOXES]
    dense = torch.zeros(len(BOXES), 32, 40, dtype=torch.float64)
    for mask, bitmap, (x0, y0, x1, y1) in zip(dense, bitmaps, BOXES, strict=True):
        mask[y0:y1, x0:x1] = torch.from_numpy(bitmap)
    packed = pack_masks(bitmaps, torch.tensor(BOXES, dtype=torch.int32))
    return CompactMasks(packed["values"], packed["boxes"], packed["offsets"], (32, 40)), dense


def edge_points(dtype: torch.dtype) -> torch.Tensor:
    """Points everywhere, and on the frame's edges and corners."""
    random = torch.rand(500, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    low, high = random.clone(), random.clone()
    low[:, 0], high[:, 1] = 0, 1
    corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=dtype)
    return torch.cat([random, low, high, corners])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compact_masks_sample_as_grid_sample_does_on_dense_ones(dtype: torch.dtype) -> None:
    compact, dense = masks_of_random_boxes()
    points = edge_points(dtype).expand(len(BOXES), -1, -1)
    expected = F.grid_sample(dense.unsqueeze(1).to(dtype), 2 * points.unsqueeze(2) - 1, align_corners=False)[:, 0, :, 0]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for masks in (compact, CompactMasks.from_dense([dense[:2], dense[2:2], dense[2:]])):
        torch.testing.assert_close(masks.sample(torch.arange(5), points), expected, rtol=0, atol=tolerance)


def test_masks_sampled_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compact, _ = masks_of_random_boxes()
    which = torch.tensor([4, 0, 0, 3, 1, 2])
    points = edge_points(torch.float32).expand(6, -1, -1)
    whole = compact.sample(which, points)
    monkeypatch.setitem(compact_masks.VALUES_AT_ONCE, "cpu", 1)
    assert torch.equal(compact.sample(which, points), whole)


def test_chunks_cover_every_row_once() -> None:
    rows = [row for some in chunks(1000, 2**16, torch.device("cpu")) for row in range(1000)[some]]
    assert rows == list(range(1000))
    assert chunks(0, 5, torch.device("cpu")) == []


@pytest.mark.parametrize("values", [1, 30, 40, 10**6])
def test_rows_of_several_images_share_chunks(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compact_masks.VALUES_AT_ONCE, "cpu", values)
    counts, device = [3, 0, 5, 1], torch.device("cpu")
    found = chunks_of_images(counts, 10, device)
    assert [rows for rows, _ in found] == [slice(one.start, min(one.stop, 9)) for one in chunks(9, 10, device)]
    pairs = [
        (image, rows.start + row) for rows, parts in found for image, own in parts for row in range(*own.indices(9))
    ]
    images = [image for image, count in enumerate(counts) for _ in range(count)]
    assert pairs == list(zip(images, range(9), strict=True))


def test_the_logits_of_pairs_are_products_with_their_own_images_features() -> None:
    embeddings, features = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, 6, 7, dtype=torch.float64)
    found = pair_logits(embeddings, features, [(0, slice(0, 2)), (2, slice(2, 5))])
    expected = torch.einsum("mc,mchw->mhw", embeddings, features[[0, 0, 2, 2, 2]])
    torch.testing.assert_close(found, expected)


def test_the_masks_of_each_image_are_sampled_at_its_own_points() -> None:
    compact, _ = masks_of_random_boxes()
    points = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(0))
    first, none, last = compact.sample_images([2, 0, 3], points)
    assert torch.equal(first, compact.sample(torch.arange(2), points[:1].expand(2, -1, -1)))
    assert none.shape == (0, 7)
    assert torch.equal(last, compact.sample(torch.arange(2, 5), points[2:].expand(3, -1, -1)))
