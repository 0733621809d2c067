"""Mask2Former's loss for all decoder outputs at once, normalised over the whole global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .matching import CompactMasks, Matches, match


@dataclass(frozen=True)
class Points:
    """The random points of one loss, all in [0, 1]: given by tests, drawn otherwise.

    matching (B, P, 2); candidates (M, 3 P, 2) to take the uncertain ones from; random (M, P - uncertain, 2).
    """

    matching: Tensor
    candidates: Tensor | None = None
    random: Tensor | None = None


@dataclass(frozen=True)
class LossSettings:
    """The constants of Mask2Former's loss (paper, section 4.1, and its released configurations)."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of the three terms, in the loss and in the matching cost."""
        return {"class": self.class_weight, "mask": self.mask_weight, "dice": self.dice_weight}


def normalizer(class_labels: Sequence[Tensor], num_queries: int, no_object_weight: float) -> Tensor:
    """Return the two divisors of the loss as float64 (2,): number of masks, and total weight of the class terms.

    Both follow from the number of targets alone, so they can be summed over ranks and accumulated micro-batches before
    the first forward pass. An image has min(N, Q) matched queries of weight 1; the others weigh `no_object_weight`.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, num_queries) for count in counts)
    unmatched = num_queries * len(counts) - matched
    return torch.tensor([float(sum(counts)), matched + no_object_weight * unmatched], dtype=torch.float64)


class Criterion(nn.Module):
    """Classification, binary cross entropy and dice of every decoder output, computed in float32.

    Equal to transformers' `Mask2FormerLoss` given the same points, except for the divisor: transformers divides by the
    world size twice and knows nothing of accumulated batches (see `normalizer`).
    """

    def __init__(self, num_labels: int, settings: LossSettings) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.settings = settings

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        class_logits: Tensor,
        masks: CompactMasks,
        class_labels: Sequence[Tensor],
        divisors: Tensor | None = None,
        points: Points | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms, each a vector of the L outputs: loss_cross_entropy, loss_mask, loss_dice.

        embeddings (L, B, Q, C), features (B, C, h, w), class_logits (L, B, Q, K + 1), divisors as `normalizer` gives
        them (default: of this batch), T masks and class_labels [(N_b,)] in the batch's order.
        """
        with torch.autocast(features.device.type, enabled=False):
            embeddings, features, class_logits = (_at_least_float32(t) for t in (embeddings, features, class_logits))
            if points is None:
                shape = (features.shape[0], self.settings.num_points, 2)
                points = Points(torch.rand(shape, device=features.device, dtype=features.dtype))
            if divisors is None:
                divisors = normalizer(class_labels, class_logits.shape[2], self.settings.no_object_weight)
            divisors = divisors.to(features, non_blocking=True)
            matches = match(
                embeddings, features, class_logits, masks, class_labels, points.matching, self.settings.weights
            )
            classes = self._class_loss(class_logits, class_labels, matches) / divisors[1]
            mask, dice = self._mask_losses(embeddings, features, masks, matches, points)
            untouched = 0 * (embeddings.sum() + features.sum())  # a rank without objects gives gradients too
            count = divisors[0].clamp(min=1)
            return {
                "loss_cross_entropy": self.settings.class_weight * classes,
                "loss_mask": self.settings.mask_weight * mask / count + untouched,
                "loss_dice": self.settings.dice_weight * dice / count,
            }

    def _class_loss(self, class_logits: Tensor, class_labels: Sequence[Tensor], matches: Matches) -> Tensor:
        """Summed weighted cross entropy of all queries -> (L,)."""
        targets = torch.full(class_logits.shape[:3], self.num_labels, device=class_logits.device)
        labels = torch.cat(tuple(class_labels))
        targets[matches.level, matches.image, matches.query] = labels[matches.target]
        losses = F.cross_entropy(class_logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(targets)
        weights = torch.ones_like(losses).masked_fill(targets == self.num_labels, self.settings.no_object_weight)
        return (losses * weights).sum((1, 2))

    def _mask_losses(
        self, embeddings: Tensor, features: Tensor, masks: CompactMasks, matches: Matches, points: Points
    ) -> tuple[Tensor, Tensor]:
        """Summed binary cross entropy and dice of the matched pairs -> two (L,)."""
        levels = embeddings.shape[0]
        if len(matches.level) == 0:
            return embeddings.new_zeros(levels), embeddings.new_zeros(levels)
        logits = matched_logits(embeddings, features, matches)
        with torch.no_grad():
            chosen = uncertain_points(logits, self.settings, points)
            truth = masks.sample(matches.target, chosen)
        sampled = sample_logits(logits, chosen)  # (M, P)
        cross_entropy = F.binary_cross_entropy_with_logits(sampled, truth, reduction="none").mean(1)
        inside = sampled.sigmoid()
        union = inside.sum(1) + truth.sum(1)
        dice = 1 - (2 * (inside * truth).sum(1) + 1) / (union + 1)
        zeros = embeddings.new_zeros(levels)
        return zeros.index_add(0, matches.level, cross_entropy), zeros.index_add(0, matches.level, dice)


def matched_logits(embeddings: Tensor, features: Tensor, matches: Matches) -> Tensor:
    """Mask logits of the matched pairs alone -> (M, h, w): the only dense masks of a training step."""
    chosen = embeddings[matches.level, matches.image, matches.query]  # (M, C)
    per_image = zip(chosen.split(matches.per_image), features.flatten(2), strict=True)
    return torch.cat([pairs @ feature for pairs, feature in per_image]).view(-1, *features.shape[-2:])


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of each map (M, h, w) at its own points (M, P, 2) in [0, 1] -> (M, P)."""
    return F.grid_sample(logits.unsqueeze(1), 2 * points.unsqueeze(2) - 1, align_corners=False)[:, 0, :, 0]


def uncertain_points(logits: Tensor, settings: LossSettings, points: Points) -> Tensor:
    """Choose P points a pair, most of them where its logit is nearest to 0 -> (M, P, 2).

    PointRend's importance sampling (Kirillov et al. 2020, https://arxiv.org/abs/1912.08193, section 3.2).
    """
    pairs, total = logits.shape[0], settings.num_points
    uncertain = int(settings.importance_sample_ratio * total)
    candidates, random = points.candidates, points.random
    if candidates is None:
        candidates = torch.rand(
            pairs, int(total * settings.oversample_ratio), 2, device=logits.device, dtype=logits.dtype
        )
    if random is None:
        random = torch.rand(pairs, total - uncertain, 2, device=logits.device, dtype=logits.dtype)
    best = sample_logits(logits, candidates).abs().topk(uncertain, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, best.unsqueeze(-1).expand(-1, -1, 2)), random], dim=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
