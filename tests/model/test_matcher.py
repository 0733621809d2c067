"""Compact masks and the matching."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f_trainer.data.collate import pack_masks
from m2f_trainer.model import compact_masks
from m2f_trainer.model.compact_masks import CompactMasks, chunks
from m2f_trainer.model.criterion import sample_features
from m2f_trainer.model.matcher import Matches, match

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
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


def match_at(
    points: torch.Tensor,
    embeddings: torch.Tensor,
    features: torch.Tensor,
    logits: torch.Tensor,
    masks: CompactMasks,
    labels: list[torch.Tensor],
) -> Matches:
    """Match by the values of features (B, C, h, w) and masks at points (B, P, 2)."""
    targets = masks.sample_images([len(own) for own in labels], points)
    return match(embeddings, sample_features(features, points), logits, targets, labels, WEIGHTS)


def test_perfect_predictions_are_matched_to_their_targets() -> None:
    masks, dense = masks_of_random_boxes()
    order = torch.tensor([3, 0, 4, 2, 1])
    features = torch.cat([dense[:, ::4, ::4].float() * 20 - 10]).unsqueeze(0)  # one channel a target
    embeddings = torch.eye(5)[order].expand(2, 1, 5, 5)
    points = torch.rand(1, 4096, 2)
    logits = torch.zeros(2, 1, 5, 3)
    matches = match_at(points, embeddings, features, logits, masks, [torch.zeros(5, dtype=torch.long)])
    for level in range(2):
        some = matches.level == level
        big = [query for query in matches.query[some].tolist() if order[query] in (1, 3)]  # not lost by the stride
        found = dict(zip(matches.query[some].tolist(), matches.target[some].tolist(), strict=True))
        assert all(found[query] == order[query] for query in big)


def test_more_targets_than_queries_match_every_query_once() -> None:
    masks, _ = masks_of_random_boxes()
    features, embeddings = torch.randn(1, 4, 8, 10), torch.randn(3, 1, 2, 4)
    matches = match_at(
        torch.rand(1, 64, 2), embeddings, features, torch.randn(3, 1, 2, 4), masks, [torch.arange(5) % 3]
    )
    assert matches.per_image == [6]
    assert sorted(zip(matches.level.tolist(), matches.query.tolist(), strict=True)) == [
        (level, query) for level in range(3) for query in range(2)
    ]


def test_costs_that_are_not_numbers_are_matched_all_the_same() -> None:
    masks, _ = masks_of_random_boxes()
    embeddings = torch.randn(1, 1, 6, 4)
    embeddings[0, 0, 2] = torch.nan
    labels = [torch.zeros(5, dtype=torch.long)]
    matches = match_at(
        torch.rand(1, 64, 2), embeddings, torch.randn(1, 4, 8, 10), torch.randn(1, 1, 6, 2), masks, labels
    )
    assert 2 not in matches.query.tolist()
