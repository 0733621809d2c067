"""Rescore queries within the class logits, so that every user of the logits, exports included, ranks alike.

Two factors multiply the class probabilities of a query; the rest of the probability goes to "no object". They are the
predicted IoU of its mask (see `quality`), and the decay of Matrix NMS where a mask with a higher score overlaps it
(SOLOv2, Wang et al. 2020, https://arxiv.org/abs/2003.10152, section 3.3). No query is removed.
"""

import torch
from torch import Tensor

EPSILON = 1e-6
"""Lower bound of divisors and factors, so that logits stay finite."""


def rank(class_logits: Tensor, mask_logits: Tensor, quality_logits: Tensor | None, nms: bool) -> Tensor:
    """Rescored class logits (B, Q, K + 1); unchanged without quality_logits (B, Q) and `nms`.

    With `nms`, the probability of any object is replaced by its square root. It is low for duplicates, which were
    unmatched in training, and the decay already penalises those (measured on nuclei: +1 AP). Computed in float32.
    """
    if quality_logits is None and not nms:
        return class_logits
    with torch.autocast(class_logits.device.type, enabled=False):
        ranked = class_logits.float()
        if quality_logits is not None:
            ranked = rescaled(ranked, quality_logits.float().sigmoid().clamp(min=EPSILON))
        if nms:
            ranked = rescaled(ranked, objectness(class_logits.float()).rsqrt())
            ranked = rescaled(ranked, matrix_nms(ranked, mask_logits.float()))
    return ranked


def objectness(class_logits: Tensor) -> Tensor:
    """The probability (...) of any class, at least `EPSILON`, of logits (..., K + 1) with "no object" last."""
    return class_logits.softmax(-1)[..., :-1].sum(-1).clamp(min=EPSILON)


def rescaled(class_logits: Tensor, factor: Tensor) -> Tensor:
    """Logits (..., K + 1) whose softmax is each class's probability times a query's `factor`; "no object" is the rest.

    class_logits (..., K + 1), "no object" last; factor (...), above 0 and such that the class probabilities sum to at
    most 1. The logits are log probabilities.
    """
    logs = class_logits.log_softmax(-1)
    objects = logs[..., :-1] + factor.log().unsqueeze(-1)
    nothing = 1 - objects.logsumexp(-1, keepdim=True).exp()
    return torch.cat([objects, nothing.clamp(min=EPSILON**2).log()], -1)


def matrix_nms(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """The decay (B, Q), above 0 and at most 1, of class_logits (B, Q, K + 1) with mask_logits (B, Q, h, w).

    Queries are compared within their likeliest class and ordered by its probability x mean mask probability, as
    predictions are. The decay of query j is the minimum, over the better queries i, of (1 - IoU(i, j)) / (1 - c(i)),
    where c(i) is the largest IoU of i with a query that is better than i; IoUs are of the masks at the logits' size.
    """
    best, label = class_logits.softmax(-1)[..., :-1].max(-1)  # (B, Q)
    logits = mask_logits.flatten(2)
    inside = (logits > 0).to(best)  # (B, Q, h x w)
    area = inside.sum(-1)
    score = best * (logits.sigmoid() * inside).sum(-1) / area.clamp(min=1)
    common = inside @ inside.transpose(1, 2)
    overlap = common / (area.unsqueeze(2) + area.unsqueeze(1) - common).clamp(min=1)  # (B, Q, Q)
    place = torch.arange(score.shape[1], device=score.device)
    first = (score.unsqueeze(2) > score.unsqueeze(1)) | (
        (score.unsqueeze(2) == score.unsqueeze(1)) & (place.unsqueeze(1) < place)
    )
    better = first & (label.unsqueeze(2) == label.unsqueeze(1))  # i is better than j
    covered = overlap.masked_fill(~better, 0).amax(1)  # c, (B, Q)
    decay = (1 - overlap) / (1 - covered).clamp(min=EPSILON).unsqueeze(2)
    return decay.masked_fill(~better, 1).amin(1).clamp(min=EPSILON)
