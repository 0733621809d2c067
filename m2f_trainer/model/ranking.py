"""Ranking of the queries of an image, within the class logits: everything that reads them ranks so, exports too.

What is known of a query beside its classes multiplies their probabilities, and "no object" takes the rest: the
predicted IoU of its mask (see `quality`), and the decay of Matrix NMS where a better query covers it (SOLOv2, Wang et
al. 2020, https://arxiv.org/abs/2003.10152, section 3.3). Nothing is dropped: two touching objects both survive.
"""

import torch
from torch import Tensor

LEAST = 1e-6
"""Of what divides, and of a decay: logits stay finite."""


def rank(class_logits: Tensor, mask_logits: Tensor, quality_logits: Tensor | None, nms: bool) -> Tensor:
    """Class logits (B, Q, K + 1) that rank; as given where there are no quality_logits (B, Q) and there is no `nms`.

    With `nms` the probability that there is an object counts by its square root: it is low where another query was
    matched instead, which the decays say too (measured on nuclei: 1 AP more). Computed in float32.
    """
    if quality_logits is None and not nms:
        return class_logits
    with torch.autocast(class_logits.device.type, enabled=False):
        ranked = class_logits.float()
        if quality_logits is not None:
            ranked = rescaled(ranked, quality_logits.float().sigmoid().clamp(min=LEAST))
        if nms:
            ranked = rescaled(ranked, objectness(class_logits.float()).rsqrt())
            ranked = rescaled(ranked, matrix_nms(ranked, mask_logits.float()))
    return ranked


def objectness(class_logits: Tensor) -> Tensor:
    """The probability (...) of any class at all, above 0: of logits (..., K + 1), "no object" last."""
    return class_logits.softmax(-1)[..., :-1].sum(-1).clamp(min=LEAST)


def rescaled(class_logits: Tensor, factor: Tensor) -> Tensor:
    """Logits (..., K + 1) whose softmax has each class's probability times a query's `factor`, and no object the rest.

    class_logits (..., K + 1), "no object" last; factor (...), above 0, with which the probabilities add up to at most
    1. The logits are log probabilities.
    """
    logs = class_logits.log_softmax(-1)
    objects = logs[..., :-1] + factor.log().unsqueeze(-1)
    nothing = 1 - objects.logsumexp(-1, keepdim=True).exp()
    return torch.cat([objects, nothing.clamp(min=LEAST**2).log()], -1)


def matrix_nms(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """The decay (B, Q), above 0 and at most 1, of class_logits (B, Q, K + 1) with mask_logits (B, Q, h, w).

    Queries are compared within their likeliest class and ordered by its probability x mean mask probability, as
    predictions are. Query j decays by the least, over the better queries i, of (1 - IoU(i, j)) / (1 - c(i)), where c(i)
    is the largest IoU of i with a query that is better than i; IoUs are of the masks at the logits' size.
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
    decay = (1 - overlap) / (1 - covered).clamp(min=LEAST).unsqueeze(2)
    return decay.masked_fill(~better, 1).amin(1).clamp(min=LEAST)
