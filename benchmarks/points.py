"""How much the random points of the loss change matches and gradients from one draw to the next.

python -m benchmarks.points CHECKPOINT --dataset DATASET

The loss of the same images is computed several times, with new points each time:

    same query   share of objects, over all layers, that two draws match to the same query; mean over pairs of draws
    noise        variance of the gradient of all weights between draws, divided by the square of the mean gradient

for points that are independent of each other, and for those of the loss (`criterion.scattered`), with as many points in
matching as in the mask losses and with up to `MATCHING_POINTS`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import labelled
from benchmarks.measure import parser, report
from m2f_trainer.data.collate import collate
from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.model import criterion
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.model.matcher import Matches

Scatter = Callable[[int, int, Tensor], Tensor]


def independent(rows: int, count: int, like: Tensor) -> Tensor:
    """Independent points in [0, 1], (rows, count, 2)."""
    return torch.rand(rows, count, 2, device=like.device, dtype=like.dtype)


def main() -> None:
    """Measure a checkpoint and print one row for each way to draw the points."""
    made = parser(__doc__ or "")
    made.add_argument("model", metavar="CHECKPOINT")
    made.add_argument("--dataset", required=True)
    made.add_argument("--images", type=int, default=4, help="images or tiles")
    made.add_argument("--draws", type=int, default=6)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, model = load_dataset(arguments.dataset)["valid"], load_model(arguments.model)
    samples = labelled(model, rows, categories_of(rows))
    batch = collate([samples[k * len(samples) // arguments.images] for k in range(arguments.images)])
    model.train()
    model.encoder.backbone.requires_grad_(False)
    table = []
    fewest = model.criterion.settings.num_points
    for matching in sorted({fewest, max(fewest, criterion.MATCHING_POINTS)}):
        for scatter in (independent, criterion.scattered):
            with drawn(scatter, matching):
                draws = [draw(model, batch) for _ in range(arguments.draws)]
            table.append({"matching": matching, "points": scatter.__name__, **figures(draws)})
    report("Points of the loss", table, arguments)


@contextmanager
def drawn(scatter: Scatter, matching: int) -> Iterator[None]:
    """Draw the points of the loss by another function, and at most `matching` of them for the matching."""
    before = criterion.scattered, criterion.MATCHING_POINTS
    criterion.scattered, criterion.MATCHING_POINTS = scatter, matching
    try:
        yield
    finally:
        criterion.scattered, criterion.MATCHING_POINTS = before


def draw(model: M2FModel, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One draw: the query of each pair of layer and object, int64 (L, T) with -1 for none, and the gradient, (W,)."""
    found: list[Matches] = []
    match = criterion.match

    def noted(*inputs: Any) -> Matches:
        found.append(match(*inputs))
        return found[-1]

    criterion.match = noted
    try:
        model.zero_grad()
        model(**batch).loss.backward()
    finally:
        criterion.match = match
    (matches,) = found
    queries = torch.full((int(matches.level.max()) + 1, sum(map(len, batch["class_labels"]))), -1)
    queries[matches.level, matches.target] = matches.query
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return queries, torch.cat(gradients)


def figures(draws: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The row of a table: agreement of the matches, and noise of the gradient without the noise of its mean."""
    queries, gradients = torch.stack([one for one, _ in draws]), torch.stack([one for _, one in draws])
    same = [float((queries[a] == queries[b]).float().mean()) for a, b in combinations(range(len(draws)), 2)]
    noise = float(gradients.var(0).sum())
    signal = float(gradients.mean(0).square().sum()) - noise / len(draws)
    return {"same query": sum(same) / len(same), "noise": noise / signal}


if __name__ == "__main__":
    main()
