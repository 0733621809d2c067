"""Hungarian matching of decoder outputs to targets."""

import torch

from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.matcher import Matches, match
from m2f_trainer.model.points import sample_features
from tests.model.test_compact_masks import masks_of_random_boxes

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}


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
