"""Mask2Former's loss for all decoder outputs at once, normalised over the whole global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compact_masks import CompactMasks, chunks_of_images, pair_logits
from .deformable_grid import ALIGN_CORNERS, BILINEAR, ZEROS
from .discrimination import discrimination
from .matcher import Matches, match
from .points import random_points, sample_features, sample_logits
from .quality import best_overlaps, seen_queries
from .sources import ModelError


@dataclass(frozen=True)
class Points:
    """The random points of one loss, all in [0, 1]; tests pass fixed ones.

    matching (B, P, 2); candidates (M, 3 P, 2), from which the uncertain ones are chosen; random (M, P - uncertain, 2).
    """

    matching: Tensor
    candidates: Tensor | None = None
    random: Tensor | None = None

    def of(self, some: slice) -> "Points":
        """The points of a slice of the pairs."""
        candidates, random = self.candidates, self.random
        return Points(
            self.matching,
            candidates[some] if candidates is not None else None,
            random[some] if random is not None else None,
        )


@dataclass(frozen=True)
class LossSettings:
    """The constants of Mask2Former's loss (paper, section 4.1, and its released configurations).

    class_weights: weight of each class in the cross entropy, (K,); () for 1 each. As in `torch.nn.CrossEntropyLoss`, it
    multiplies the terms of a class, and the sum is divided by the total weight.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    discrimination_weight: float = 0.0
    quality_weight: float = 0.0
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise ModelError for a value that the loss can't be computed with."""
        share = self.importance_sample_ratio
        for name, value, fits, expected in (
            ("no_object_weight", self.no_object_weight, self.no_object_weight >= 0, "at least 0"),
            ("train_num_points", self.num_points, self.num_points >= 1, "at least 1"),
            ("importance_sample_ratio", share, 0 <= share <= 1, "between 0 and 1"),
            (
                "oversample_ratio",
                self.oversample_ratio,
                self.oversample_ratio >= share,
                "importance_sample_ratio or more",
            ),
        ):
            if not fits:
                raise ModelError(f"{name} of the head's configuration: expected {expected}, got {value}")

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of the three terms, in the loss and in the matching cost."""
        return {"class": self.class_weight, "mask": self.mask_weight, "dice": self.dice_weight}


def normalizer(
    class_labels: Sequence[Tensor], num_queries: int, no_object_weight: float, class_weights: Sequence[float] = ()
) -> Tensor:
    """Return the two divisors of the loss as float64 (2,): number of masks, and total weight of the class terms.

    Both follow from the targets alone, so they can be summed over ranks and accumulated micro-batches before the first
    forward pass. An image has min(N, Q) matched queries, with the weight of their class (1 without `class_weights`);
    the others have `no_object_weight`. If there are more objects than queries, each matched query counts with the mean
    weight of the image's objects.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, num_queries) for count in counts)
    weight = float(matched)
    if class_weights:
        table = torch.tensor(class_weights, dtype=torch.float64)
        means = [float(table[labels.cpu()].mean()) if len(labels) else 0.0 for labels in class_labels]
        weight = sum(mean * min(count, num_queries) for mean, count in zip(means, counts, strict=True))
    unmatched = num_queries * len(counts) - matched
    return torch.tensor([float(sum(counts)), weight + no_object_weight * unmatched], dtype=torch.float64)


class Criterion(nn.Module):
    """Classification, binary cross entropy and dice of every decoder output, computed in float32.

    Equal to transformers' `Mask2FormerLoss` given the same points, except for the divisor: transformers divides by the
    world size twice and ignores accumulated batches (see `normalizer`).
    """

    def __init__(self, num_labels: int, settings: LossSettings) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.settings = settings

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        class_logits: Tensor,
        masks: CompactMasks,
        class_labels: Sequence[Tensor],
        divisors: Tensor | None = None,
        points: Points | None = None,
        quality_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms: loss_cross_entropy, loss_mask and loss_dice, each (L,) for the L outputs.

        With a discrimination_weight there is also loss_discrimination (1,), which depends on the features only.
        With quality_logits (B, Q') of the last output's `seen_queries` there is a loss_quality (1,), scaled to Q.

        embeddings (L, B, Q, C), features (B, C, h, w), class_logits (L, B, Q, K + 1), divisors as `normalizer` gives
        them (default: of this batch), T masks and class_labels [(N_b,)] in the batch's order.
        """
        with torch.autocast(features.device.type, enabled=False):
            embeddings, features, class_logits = (_at_least_float32(t) for t in (embeddings, features, class_logits))
            if points is None:
                points = Points(random_points(len(features), self.settings.num_points, features))
            if divisors is None:
                divisors = normalizer(
                    class_labels,
                    class_logits.shape[2],
                    self.settings.no_object_weight,
                    self.settings.class_weights,
                )
            divisors = divisors.to(features, non_blocking=True)
            counts = [len(labels) for labels in class_labels]
            learnt = features if self.settings.discrimination_weight else features.detach()
            sampled = sample_features(learnt, points.matching)
            targets = masks.sample_images(counts, points.matching)
            matches = match(embeddings, sampled, class_logits, targets, class_labels, self.settings.weights)
            classes = self._classes(class_logits, class_labels, matches)  # (L, B, Q)
            weights = self._query_weights(classes, class_logits.dtype)
            entropy = F.cross_entropy(class_logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)
            mask, dice = self._mask_losses(embeddings, features, masks, matches, points)
            untouched = 0 * (embeddings.sum() + features.sum())  # gradients of 0 on a rank without objects
            count = divisors[0].clamp(min=1)
            weight = divisors[1].clamp(min=torch.finfo(divisors.dtype).tiny)  # 0 with a no_object_weight of 0
            terms = {
                "loss_cross_entropy": self.settings.class_weight * (entropy * weights).sum((1, 2)) / weight,
                "loss_mask": self.settings.mask_weight * mask / count + untouched,
                "loss_dice": self.settings.dice_weight * dice / count,
            }
            if self.settings.discrimination_weight:
                apart = discrimination(sampled, targets) / count
                terms["loss_discrimination"] = self.settings.discrimination_weight * apart.unsqueeze(0)
            if quality_logits is not None:
                seen = seen_queries(self.training)
                truth = best_overlaps(embeddings[-1][:, seen], features, masks, sampled, targets)
                losses = F.binary_cross_entropy_with_logits(quality_logits.float(), truth, reduction="none")
                share = losses.shape[1] / weights.shape[2]
                quality = (losses * weights[-1][:, seen]).sum() / (share * weight)
                terms["loss_quality"] = self.settings.quality_weight * quality.unsqueeze(0)
            return terms

    def _classes(self, class_logits: Tensor, class_labels: Sequence[Tensor], matches: Matches) -> Tensor:
        """The class of each query's target, int64 (L, B, Q); K for the queries without one."""
        classes = torch.full(class_logits.shape[:3], self.num_labels, device=class_logits.device)
        labels = torch.cat(tuple(class_labels))
        classes[matches.level, matches.image, matches.query] = labels[matches.target]
        return classes

    def _query_weights(self, classes: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of each query by the class of its target, (L, B, Q)."""
        if self.settings.class_weights:
            table = [*self.settings.class_weights, self.settings.no_object_weight]
            return torch.tensor(table, dtype=dtype, device=classes.device)[classes]
        weights = torch.ones(classes.shape, dtype=dtype, device=classes.device)
        return weights.masked_fill(classes == self.num_labels, self.settings.no_object_weight)

    def _mask_losses(
        self, embeddings: Tensor, features: Tensor, masks: CompactMasks, matches: Matches, points: Points
    ) -> tuple[Tensor, Tensor]:
        """Summed binary cross entropy and dice of the matched pairs -> two (L,)."""
        levels = embeddings.shape[0]
        if len(matches.level) == 0:
            return embeddings.new_zeros(levels), embeddings.new_zeros(levels)
        chosen = embeddings[matches.level, matches.image, matches.query]  # (M, C)
        cross_entropy, dice = PointLosses.apply(  # type: ignore[no-untyped-call]
            chosen, features, masks, matches, self.settings, points
        )
        zeros = embeddings.new_zeros(levels)
        return zeros.index_add(0, matches.level, cross_entropy), zeros.index_add(0, matches.level, dice)


class PointLosses(torch.autograd.Function):
    """Binary cross entropy and dice of the matched pairs at their points, computed in chunks of pairs.

    A pair's mask, the product of its embedding and the features, exists only while its points are chosen. Only the
    points and the probabilities there are saved for backward, which samples the targets again and computes the gradient
    of the masks in chunks too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: Tensor,
        features: Tensor,
        masks: CompactMasks,
        matches: Matches,
        settings: LossSettings,
        points: Points,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the pairs (M, C) and features (B, C, h, w) -> the two losses of each pair, (M,) each."""
        chosen = pairs.new_empty(len(pairs), settings.num_points, 2)
        inside = pairs.new_empty(chosen.shape[:2])
        cross_entropy, dice = pairs.new_empty(len(pairs)), pairs.new_empty(len(pairs))
        each = max(features[0, 0].numel(), int(settings.num_points * settings.oversample_ratio))
        ctx.chunks = chunks_of_images(matches.per_image, each, features.device)
        for some, parts in ctx.chunks:
            logits = pair_logits(pairs[some], features, parts)
            chosen[some] = uncertain_points(logits, settings, points.of(some))
            truth = masks.sample(matches.target[some], chosen[some])
            sampled = sample_logits(logits, chosen[some])
            torch.sigmoid(sampled, out=inside[some])
            cross_entropy[some] = F.binary_cross_entropy_with_logits(sampled, truth, reduction="none").mean(1)
            overlap, union = _overlap(inside[some], truth)
            dice[some] = 1 - (overlap + 1) / (union + 1)
        ctx.save_for_backward(pairs, features, chosen, inside)
        ctx.masks, ctx.targets = masks, matches.target
        return cross_entropy, dice

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the embeddings (M, C) and the features (B, C, h, w)."""
        pairs, features, chosen, inside = ctx.saved_tensors
        last = features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format  # of others a matrix (C, h x w) is a copy
        grad_pairs, grad_features = torch.empty_like(pairs), torch.zeros_like(features, memory_format=layout)
        for some, parts in ctx.chunks:
            within, target = inside[some], ctx.masks.sample(ctx.targets[some], chosen[some])
            overlap, union = (tensor.unsqueeze(1) for tensor in _overlap(within, target))
            entropy = (grad_entropy[some] / target.shape[1]).unsqueeze(1)
            share = grad_dice[some].unsqueeze(1) / (union + 1)
            slope = share * ((overlap + 1) / (union + 1) - 2 * target)  # dice, to the probability
            slope = torch.addcmul(entropy * (within - target), slope, within * (1 - within))  # to the logit
            grad_logits = _scatter_gradients(slope, chosen[some], features.shape[-2:])  # (m, h x w)
            for image, rows in parts:
                torch.mm(grad_logits[rows], features[image].flatten(1).T, out=grad_pairs[some][rows])
                grad_features[image].view(features.shape[1], -1).addmm_(pairs[some][rows].T, grad_logits[rows])
        return grad_pairs, grad_features, None, None, None, None


def _overlap(inside: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Dice's 2 x intersection and sum of areas, of (m, P) probabilities and targets -> (m,) each."""
    return 2 * torch.linalg.vecdot(inside, truth), inside.sum(1) + truth.sum(1)


def _scatter_gradients(slope: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """The transpose of `sample_logits`: gradients (m, P) at points (m, P, 2) -> gradients of the maps, (m, h x w)."""
    grid, maps = 2 * points.unsqueeze(2) - 1, slope.new_empty(len(slope), 1, *size)
    spread: Tensor = torch.ops.aten.grid_sampler_2d_backward(
        slope[:, None, :, None], maps, grid, BILINEAR, ZEROS, ALIGN_CORNERS, [True, False]
    )[0]
    return spread.flatten(1)


def uncertain_points(logits: Tensor, settings: LossSettings, points: Points) -> Tensor:
    """Choose P points a pair, most of them where its logit is nearest to 0 -> (M, P, 2).

    PointRend's importance sampling (Kirillov et al. 2020, https://arxiv.org/abs/1912.08193, section 3.2).
    """
    pairs, total = logits.shape[0], settings.num_points
    uncertain = int(settings.importance_sample_ratio * total)
    candidates, random = points.candidates, points.random
    if candidates is None:
        candidates = random_points(pairs, int(total * settings.oversample_ratio), logits)
    if random is None:
        random = random_points(pairs, total - uncertain, logits)
    best = _smallest(sample_logits(logits, candidates).abs_(), uncertain)
    return torch.cat([candidates.gather(1, best.unsqueeze(-1).expand(-1, -1, 2)), random], dim=1)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices of each row's `count` smallest values, in any order: int64 (m, count). On a CPU numpy is 5x faster."""
    if values.device.type != "cpu" or not count:
        return values.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.from_numpy(np.argpartition(values.numpy(), count - 1, axis=1)[:, :count])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
