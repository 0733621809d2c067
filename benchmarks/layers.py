"""Mask quality and matching after each decoder layer of a model.

python -m benchmarks.layers CHECKPOINT [CHECKPOINT ...] --dataset DATASET

For the validation images of a dataset, or their tiles if the model was trained on tiles:

    IoU           mean mask IoU of the matched pairs after each layer
    above 0.5     share of objects whose matched mask has an IoU above 0.5
    new query     share of objects matched to another query than after the previous layer
    new since     share of objects matched to another query than in the previous checkpoint of the command line
    feature IoU   mean IoU of the objects' masks if each position is assigned to the object with the most similar mean
                  mask feature: an estimate of what the mask features allow, independent of the queries
    gradients     share of each loss term in the norm of the gradient of the mask features

Use it when a loss stops falling: it shows whether the masks are wrong from the first layer on, whether the matches keep
changing, and whether the features separate the objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import parser, report
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.data.dataset import Category, categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.tiles import TileTransform, TrainTiles
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.model.matcher import match
from m2f_trainer.model.points import sample_features

BATCH = 8


def main() -> None:
    """Measure the checkpoints in the given order and print one row for each layer of each."""
    made = parser(__doc__ or "")
    made.add_argument("models", nargs="+", metavar="CHECKPOINT")
    made.add_argument("--dataset", required=True)
    made.add_argument("--images", type=int, default=48, help="images or tiles")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = load_dataset(arguments.dataset)["valid"]
    before: LayerFigures | None = None
    table = []
    for path in arguments.models:
        figures = measure(load_model(path), rows, categories_of(rows), arguments.images)
        table += [{"model": path, **row} for row in rows_of(figures, before)]
        before = figures
    report("Decoder layers", table, arguments)


@dataclass
class LayerFigures:
    """Figures of one model: L decoder outputs, T objects of all images."""

    queries: Tensor  # int64 (L, T), -1 where an object is not matched
    ious: Tensor  # (L, T)
    features: float  # mean IoU that the mask features allow
    gradients: Mapping[str, float]  # loss term -> share of the gradient norm


def measure(model: M2FModel, rows: Any, categories: Sequence[Category], images: int) -> LayerFigures:
    """Run a model on the first images or tiles of a split."""
    loader = DataLoader(labelled(model, rows, categories), batch_size=BATCH, collate_fn=collate)
    queries, ious, oracle, gradients = [], [], [], []
    for batch in islice(loader, -(-images // BATCH)):
        torch.manual_seed(0)
        pixels = model.normalise(batch["pixel_values"], batch["pixel_mask"])
        with torch.no_grad():
            hidden, embeddings, features = model.model(pixels)
            classes = model.class_predictor(hidden)
        masks, labels = CompactMasks.of(batch["mask_labels"], pixels.shape[-2:]), batch["class_labels"]
        gradients.append(gradient_norms(model, embeddings, features, classes, masks, labels))
        points = centres(features).expand(len(features), -1, -1)
        targets = masks.sample_images([len(one) for one in labels], points)
        found = match(
            embeddings, sample_features(features, points), classes, targets, labels, model.criterion.settings.weights
        )
        query = torch.full((len(embeddings), sum(map(len, labels))), -1)
        query[found.level, found.target] = found.query
        queries.append(query)
        start = 0
        for image, target in enumerate(targets):
            true, own = target >= 0.5, query[:, start : start + len(target)]
            flat = features[image].flatten(1)
            ious.append(
                torch.stack([iou(one[at] @ flat > 0, true) for one, at in zip(embeddings[:, image], own, strict=True)])
            )
            oracle.append(iou(nearest(flat, true), true))
            start += len(target)
    mean = {name: sum(one[name] for one in gradients) for name in gradients[0]}
    total = sum(mean.values())
    shares = {name: value / total for name, value in mean.items()}
    unmatched = torch.cat(queries, 1) < 0
    return LayerFigures(
        torch.cat(queries, 1), torch.cat(ious, 1).masked_fill(unmatched, 0), float(torch.cat(oracle).mean()), shares
    )


def labelled(model: M2FModel, rows: Any, categories: Sequence[Category]) -> InstanceDataset:
    """A split as the model's training samples, without augmentation."""
    config = model.config
    size = config.image_height, config.image_width
    if config.tile_size is None:
        return InstanceDataset(rows, EvalTransform(*size), categories)
    fixed: Mapping[str, Any] = {"lsj_min_scale": 1.0, "lsj_max_scale": 1.0, "flip": False}
    return TrainTiles(rows, TileTransform(*size, config.tile_size, **fixed), categories)


def gradient_norms(
    model: M2FModel,
    embeddings: Tensor,
    features: Tensor,
    classes: Tensor,
    masks: CompactMasks,
    labels: Sequence[Tensor],
) -> dict[str, float]:
    """Loss term -> norm of its gradient with respect to the mask features, where it depends on them."""
    leaf = features.clone().requires_grad_()
    terms = model.criterion(embeddings, leaf, classes, masks, labels)
    norms = {}
    for name, term in terms.items():
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True, allow_unused=True)
            norms[name] = 0.0 if gradient is None else float(gradient.norm())
    return norms


def centres(features: Tensor) -> Tensor:
    """Mask features (B, C, h, w) -> centres of their positions, (1, h x w, 2) as x and y in [0, 1]."""
    height, width = features.shape[-2:]
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 2)


def nearest(features: Tensor, true: Tensor) -> Tensor:
    """Features (C, P) and masks (N, P) -> masks (N, P) of the positions nearest to each object's mean feature."""
    groups = torch.cat([true, ~true.any(0, keepdim=True)])
    unit = F.normalize(features, dim=0)
    means = F.normalize(groups.float() @ unit.T, dim=1)
    chosen = (means @ unit).argmax(0)
    return torch.stack([chosen == number for number in range(len(true))]) if len(true) else true


def iou(found: Tensor, true: Tensor) -> Tensor:
    """IoU of pairs of masks (N, P) -> (N,)."""
    return (found & true).sum(1) / (found | true).sum(1).clamp(min=1)


def rows_of(figures: LayerFigures, before: LayerFigures | None) -> list[dict[str, Any]]:
    """One row for each decoder output; the first also has the figures of the whole model."""
    rows = []
    for level, (query, overlap) in enumerate(zip(figures.queries, figures.ious, strict=True)):
        row: dict[str, Any] = {"layer": level, "IoU": float(overlap.mean()), "above 0.5": share(overlap > 0.5)}
        row["new query"] = share(query != figures.queries[level - 1]) if level else None
        row["new since"] = share(query != before.queries[level]) if before is not None else None
        shares = ", ".join(f"{name.removeprefix('loss_')} {value:.2f}" for name, value in figures.gradients.items())
        row |= (
            {"feature IoU": None, "gradients": ""} if level else {"feature IoU": figures.features, "gradients": shares}
        )
        rows.append(row)
    return rows


def share(which: Tensor) -> float:
    """The fraction of true values."""
    return float(which.float().mean())


if __name__ == "__main__":
    main()
