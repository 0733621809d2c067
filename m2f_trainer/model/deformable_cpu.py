"""Deformable attention for CPUs: every sample is a weighted sum of four whole rows.

`grid_sample` reads one channel at a time, so each value of a sample comes from another cache line. Here the channels of
a position are contiguous, as the projection leaves them. The forward pass is one embedding bag per corner; the gradient
of the values, its transpose, is a product with a sparse matrix. On a CPU this is several times faster.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

BORDER = 2
"""Rows of zeros around each level: a sample clamped to them reads zeros and has no gradient, as outside the map."""

QUERIES_AT_ONCE = 512
"""Chunk size that keeps the samples within a core's cache."""

Shapes = Sequence[tuple[int, int]]


def attend_rows(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Value (B, S, H, D), places (B, S, H, L, P, 2) in pixels, weights (B, S, H, L, P) -> (B, S, H x D)."""
    wide = _at_least_float32(value)
    output = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    grid = Grid(shapes, places.shape[2], places.shape[4])
    for image in range(len(value)):
        table = with_border(wide[image], shapes).flatten(0, 1)  # (rows x H, D)
        for part in _parts(value.shape[1]):
            rows, x, y = grid.corners(places[image, part])
            into = output[image, part].flatten(0, 1)
            for row, share in zip(rows, _shares(weights[image, part], x, y), strict=True):
                into += F.embedding_bag(row, table, mode="sum", per_sample_weights=share)
    return output.flatten(2).to(value.dtype)


def attend_rows_backward(
    value: Tensor, places: Tensor, weights: Tensor, grad_output: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, places and weights, in their shapes and types, given that of the output, (B, S, H x D)."""
    wide = _at_least_float32(value)
    grads = torch.empty_like(wide), torch.empty_like(places), torch.empty_like(weights)
    grad_output = grad_output.to(wide.dtype).reshape(value.shape).contiguous()
    grid = Grid(shapes, places.shape[2], places.shape[4])
    for image in range(len(value)):
        table = with_border(wide[image], shapes).flatten(0, 1)
        all_rows, all_shares = [], []
        for part in _parts(value.shape[1]):
            rows, x, y = grid.corners(places[image, part])
            weight, vectors = weights[image, part], grad_output[image, part].flatten(0, 1)
            dots = [_dots(table, row, vectors) for row in rows]
            grads[1][image, part], grads[2][image, part] = _gradients(dots, weight, x, y)
            all_rows.append(torch.cat(rows, dim=1))
            all_shares.append(torch.cat(_shares(weight, x, y), dim=1))
        spread = _spread(torch.cat(all_rows), torch.cat(all_shares), grad_output[image].flatten(0, 1), len(table))
        grads[0][image] = without_border(spread.unflatten(0, (-1, value.shape[2])), shapes)
    return grads[0].to(value.dtype), grads[1], grads[2]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Grid:
    """Row indices of a chunk's samples. A row is the channels of one position and one head, over all levels.

    Constants are expanded to every sample, so that arithmetic runs on whole arrays: (q, H x L x P).
    """

    def __init__(self, shapes: Shapes, heads: int, points: int) -> None:
        widths = torch.tensor([width + 2 * BORDER for _, width in shapes])
        rows = torch.tensor([height + 2 * BORDER for height, _ in shapes]) * widths
        starts = rows.cumsum(0) - rows + BORDER * widths + BORDER  # the row of each level's first position
        each = (QUERIES_AT_ONCE, heads, len(shapes), points)
        head = torch.arange(heads).view(-1, 1, 1)
        self.heads = heads
        self.first = (starts.view(-1, 1) * heads + head).expand(each).int().contiguous()
        self.step = (widths.view(-1, 1) * heads).expand(each).int().contiguous()
        ends = torch.tensor([[width, height] for height, width in shapes])
        self.ends = ends.unsqueeze(1).expand(*each, 2).float().contiguous()

    def corners(self, places: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Places (q, H, L, P, 2) -> the four corners' rows, int32 (q x H, L x P) each, and the second ones' shares.

        Corners are in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1); the shares x and y are (q, H, L, P).
        """
        count = len(places)
        inside = torch.minimum(places.nan_to_num(nan=-BORDER).clamp_(min=-BORDER), self.ends[:count].to(places.dtype))
        low = inside.floor()
        x, y = inside.sub_(low).permute(4, 0, 1, 2, 3).contiguous()
        column, line = low.permute(4, 0, 1, 2, 3).int()
        row = torch.addcmul(self.first[:count], line, self.step[:count]).add_(column, alpha=self.heads)
        row = row.view(-1, x[0, 0].numel())
        below = row + self.step[:count].view_as(row)
        return [row, row + self.heads, below, below + self.heads], x, y


def _shares(weights: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """Bilinear shares of weights (q, H, L, P) for the four corners -> (q x H, L x P) each."""
    right = weights * x
    left = weights - right
    lower = [left * y, right * y]
    return [share.view(-1, share[0, 0].numel()) for share in (left - lower[0], right - lower[1], *lower)]


def _gradients(dots: Sequence[Tensor], weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of places and weights from the corners' products with the output's gradient, (q, H, L, P) each."""
    a, b, c, d = (dot.view_as(x) for dot in dots)
    upper, lower = b - a, d - c  # along x, in the upper and in the lower line
    along_x = torch.addcmul(upper, y, lower - upper)
    at_upper = torch.addcmul(a, x, upper)
    along_y = torch.addcmul(c, x, lower) - at_upper
    places = torch.stack([along_x * weights, along_y * weights], dim=-1)
    return places, torch.addcmul(at_upper, y, along_y)


def _dots(table: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of table rows with each vector: rows (n, k), vectors (n, D) -> (n x k,)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)"
        )
        pattern = torch.sparse_csr_tensor(
            starts, rows.flatten(), vectors.new_zeros(rows.numel()), (len(rows), len(table)), check_invariants=False
        )
        dots: Tensor = torch.sparse.sampled_addmm(pattern, vectors, table.T, beta=0).values()
    return dots


def _spread(rows: Tensor, shares: Tensor, vectors: Tensor, count: int) -> Tensor:
    """Scatter-add weighted vectors to rows: rows and shares (n, k), vectors (n, D) -> (count, D)."""
    starts = np.arange(0, rows.numel() + 1, rows.shape[1], dtype=np.int32)
    matrix = csr_array((shares.flatten().numpy(), rows.flatten().numpy(), starts), shape=(len(rows), count))
    return torch.from_numpy(matrix.T @ vectors.numpy())


def _parts(queries: int) -> list[slice]:
    return [slice(start, start + QUERIES_AT_ONCE) for start in range(0, queries, QUERIES_AT_ONCE)]


def with_border(value: Tensor, shapes: Shapes) -> Tensor:
    """(S, H, D) -> (rows, H, D), each level framed by zeros; `without_border` is the inverse."""
    levels = value.split([height * width for height, width in shapes])
    frame = (0, 0, 0, 0, BORDER, BORDER, BORDER, BORDER)
    maps = (F.pad(level.unflatten(0, shape), frame) for level, shape in zip(levels, shapes, strict=True))
    return torch.cat([one.flatten(0, 1) for one in maps])


def without_border(table: Tensor, shapes: Shapes) -> Tensor:
    """(rows, H, D) -> (S, H, D)."""
    framed = [(height + 2 * BORDER, width + 2 * BORDER) for height, width in shapes]
    levels = table.split([height * width for height, width in framed])
    inner = slice(BORDER, -BORDER)
    maps = (level.unflatten(0, shape)[inner, inner] for level, shape in zip(levels, framed, strict=True))
    return torch.cat([one.flatten(0, 1) for one in maps])
