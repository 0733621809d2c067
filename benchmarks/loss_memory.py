"""Peak memory of the loss and its targets with many instances, compared with transformers' own.

python -m benchmarks.loss_memory --instances 400 --side 1024

The memory of the targets, the loss and its gradients is counted, above that of the decoder's outputs. transformers'
loss needs dense float masks as targets, and the mask logits of each decoder output. Each side runs in a fresh process.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from benchmarks.measure import in_fresh_process, parser, peak_mb, report
from benchmarks.stock import CATEGORIES, scene
from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.criterion import Criterion, LossSettings

WIDTH, OUTPUTS = 256, 10


def main() -> None:
    """Measure every combination of the options and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--side", type=int, nargs="+", default=[1024])
    made.add_argument("--instances", type=int, nargs="+", default=[400])
    made.add_argument("--queries", type=int, nargs="+", default=[100, 400])
    arguments = made.parse_args()
    cases = [(s, n, q) for s in arguments.side for n in arguments.instances for q in arguments.queries]
    report("Peak memory of the loss, one image", [measure(arguments, *case) for case in cases], arguments)


def measure(arguments: argparse.Namespace, side: int, instances: int, queries: int) -> dict[str, Any]:
    """One row."""
    case = (side, instances, queries, arguments.device, arguments.threads)
    peaks = {name: in_fresh_process(peak_of, name, *case) for name in ("ours", "stock")}
    return {
        "side": side,
        "instances": instances,
        "queries": queries,
        **{f"{name} MB": peak for name, peak in peaks.items()},
        "ratio": peaks["ours"] / peaks["stock"],
    }


def peak_of(name: str, side: int, instances: int, queries: int, device: str, threads: int) -> float:
    """Peak MB of "ours" or "stock". A loss of two instances is computed first, so that libraries are loaded."""
    torch.set_num_threads(threads)
    run = {"ours": ours, "stock": stock}[name]
    run(64, 2, 4, device)()
    return peak_mb(run(side, instances, queries, device), device)


def outputs(side: int, queries: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (L, 1, Q, C), features (1, C, h, w) and class logits (L, 1, Q, K + 1)."""
    shapes = (OUTPUTS, 1, queries, WIDTH), (1, WIDTH, side // 4, side // 4), (OUTPUTS, 1, queries, len(CATEGORIES) + 1)
    embeddings, features, logits = (torch.randn(shape, device=device).requires_grad_() for shape in shapes)
    return embeddings, features, logits


def ours(side: int, instances: int, queries: int, device: str) -> Any:
    """A function that computes our loss on compact bitmaps, and its gradients."""
    given = outputs(side, queries, device)
    batch, _ = scene(1, side, instances, dense=False)
    packed, labels = batch["mask_labels"], [one.to(device) for one in batch["class_labels"]]
    criterion = Criterion(len(CATEGORIES), LossSettings())

    def run() -> None:
        values, boxes, offsets = (packed[name].to(device, copy=True) for name in ("values", "boxes", "offsets"))
        terms = criterion(*given, CompactMasks(values, boxes.long(), offsets.long(), (side, side)), labels)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]

    return run


def stock(side: int, instances: int, queries: int, device: str) -> Any:
    """A function that computes transformers' loss on dense masks, and its gradients."""
    embeddings, features, logits = outputs(side, queries, device)
    batch, _ = scene(1, side, instances, dense=False)
    packed, labels = batch["mask_labels"], [one.to(device) for one in batch["class_labels"]]
    loss = Mask2FormerLoss(Mask2FormerConfig(num_labels=len(CATEGORIES)), {"loss_cross_entropy": 2.0})

    def run() -> None:
        dense = dense_masks(packed, side).to(device)
        masks = [torch.einsum("bqc,bchw->bqhw", one, features) for one in embeddings]
        others = [
            {"masks_queries_logits": mask, "class_queries_logits": one}
            for mask, one in zip(masks[:-1], logits[:-1], strict=True)
        ]
        terms = loss.to(device)(masks[-1], logits[-1], [dense], labels, others)
        torch.stack([term.sum() for term in terms.values()]).sum().backward()  # type: ignore[no-untyped-call]

    return run


def dense_masks(packed: dict[str, Tensor], side: int) -> Tensor:
    """Float masks (N, side, side), filled one by one without another array of that size."""
    dense = torch.zeros(len(packed["boxes"]), side, side)
    rows = zip(dense, packed["boxes"].tolist(), packed["offsets"].tolist(), strict=True)
    for mask, (x0, y0, x1, y1), start in rows:
        bitmap = packed["values"][start : start + (y1 - y0) * (x1 - x0)].view(y1 - y0, x1 - x0)
        mask[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = bitmap[1:-1, 1:-1]
    return dense


if __name__ == "__main__":
    main()
