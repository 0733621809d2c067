"""Samples to batches. Masks stay bitmaps cropped to their boxes, concatenated, until they reach the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from m2f_trainer.data.dataset import Category
from m2f_trainer.data.transforms import Sample
from m2f_trainer.errors import DataError

_ROWS_AT_ONCE = 1000
Transform: TypeAlias = Callable[[Mapping[str, Any], int, int, Sequence[Mapping[str, Any]]], Sample]


def object_fields(rows: datasets.Dataset, *names: str) -> npt.NDArray[np.int64]:
    """Row number and integer fields of every object, without crowd regions, (N, 1 + fields).

    The masks' text is neither copied nor joined: that of a large split has more bytes than an Arrow array can have.
    """
    found, first = [np.zeros((0, 1 + len(names)), np.int64)], 0
    for table in rows.select_columns(["objects"]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for lists in table["objects"].chunks:
            objects = lists.flatten()
            crowd, *fields = (
                pc.struct_field(objects, name).to_numpy(zero_copy_only=False) for name in ("iscrowd", *names)
            )
            numbers = first + pc.list_parent_indices(lists).to_numpy()
            found.append(np.column_stack([numbers, *fields])[~crowd.astype(bool)])
            first += len(lists)
    return np.concatenate(found)


def object_counts(rows: datasets.Dataset) -> npt.NDArray[np.int64]:
    """The number of objects in each row, without crowd regions, (len,)."""
    return np.bincount(object_fields(rows)[:, 0], minlength=len(rows)).astype(np.int64)


class InstanceDataset(Dataset[dict[str, Any]]):
    """Transformed rows, with class k for the k-th category and without crowd regions."""

    def __init__(self, rows: datasets.Dataset, transform: Transform, categories: Sequence[Category]) -> None:
        self.rows = rows
        self.transform = transform
        self.categories = categories
        self.class_of = {category.id: k for k, category in enumerate(categories)}
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentations, also in workers; call it before the epoch's first batch is loaded."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` of the epoch that was set; see `sample`."""
        return self.sample(index, self.epoch)

    @property
    def epoch(self) -> int:
        """The epoch that was set."""
        return int(self._epoch)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample of `transform` with class_labels int64 (N,) for its category ids.

        Raises:
            DataError: the image can't be read, or a category isn't one of the model's
        """
        return with_class_labels(self.transform(self.row(index, epoch), epoch, index, self.rows), self.class_of)

    def row(self, index: int, epoch: int) -> Mapping[str, Any]:
        """The row of a sample."""
        row: Mapping[str, Any] = self.rows[index]
        return row

    def objects(self) -> npt.NDArray[np.int64]:
        """The number of objects of each sample, (len,), before augmentation."""
        return object_counts(self.rows)

    def labels(self) -> npt.NDArray[np.int64]:
        """Row number and class of every object of the split, without crowd regions, (N, 2)."""
        images, ids = object_fields(self.rows, "category_id").T
        return np.column_stack([images, [self.class_of[key] for key in ids.tolist()]]).astype(np.int64)

    def unit_classes(self) -> npt.NDArray[np.int64]:
        """Every pair of a unit and a class that has objects in it, (P, 2). A unit is a row, or a tile of one."""
        return np.unique(self.labels(), axis=0)

    def images(self, epoch: int) -> npt.NDArray[np.int64]:
        """The number of the row that each sample of an epoch is made from, (len,)."""
        return np.arange(len(self))

    def units(self, epoch: int) -> npt.NDArray[np.int64]:
        """The unit of each sample of an epoch, (len,)."""
        return np.arange(len(self))

    def shares(self) -> npt.NDArray[np.float64]:
        """Average number of times that an epoch shows each unit."""
        return np.ones(len(self.rows))

    def name(self, index: int) -> str:
        """A sample in messages."""
        return f"image {self.row(index, self.epoch)['image_id']} (sample {index})"


class EvalImages(InstanceDataset):
    """Whole images to predict: samples without objects, whose rows may have classes that the model lacks."""

    def row(self, index: int, epoch: int) -> Mapping[str, Any]:
        """The row of a sample, without its objects."""
        return {**super().row(index, epoch), "objects": []}


def with_class_labels(sample: Sample, class_of: Mapping[int, int]) -> dict[str, Any]:
    """The sample with class_labels int64 (N,) in place of its category ids.

    Raises:
        DataError: a category has no class
    """
    ids = sample["category_ids"].tolist()
    unknown = sorted(set(ids) - set(class_of))
    if unknown:
        raise DataError(
            f"image {sample['image_id']}: expected categories {sorted(class_of)}, got {unknown}."
            " Use the dataset that the model's categories come from."
        )
    kept = {key: value for key, value in sample.items() if key != "category_ids"}
    return {**kept, "class_labels": torch.tensor([class_of[key] for key in ids], dtype=torch.int64)}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of B samples with T instances in all.

    Returns:
        pixel_values uint8 (B, 3, H, W); pixel_mask bool (B, H, W); class_labels B x int64 (N_b,); image_id int64 (B,);
        original_size and resized_size int64 (B, 2); mask_labels: `pack_masks` of all instances in the batch's order;
        backbone_maps, (B, C, h, w) each, where the samples have them; so is tile int64 (B, 3) of `tiles.EvalTiles`
    """
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "pixel_mask": torch.stack([sample["pixel_mask"] for sample in samples]),
        "mask_labels": pack_masks(
            [bitmap for sample in samples for bitmap in sample["masks"]],
            torch.cat([sample["boxes"] for sample in samples]),
        ),
        "class_labels": [sample["class_labels"] for sample in samples],
        "image_id": torch.tensor([sample["image_id"] for sample in samples], dtype=torch.int64),
        "original_size": torch.tensor([sample["original_size"] for sample in samples], dtype=torch.int64),
        "resized_size": torch.tensor([sample["resized_size"] for sample in samples], dtype=torch.int64),
    }
    if "backbone_maps" in samples[0]:
        maps = zip(*(sample["backbone_maps"] for sample in samples), strict=True)
        batch["backbone_maps"] = [torch.stack(images) for images in maps]
    if "tile" in samples[0]:
        batch["tile"] = torch.tensor([sample["tile"] for sample in samples], dtype=torch.int64)
    return batch


def pack_masks(bitmaps: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """T bitmaps as values uint8 (V,), boxes int64 (T, 4) and offsets int64 (T,); `unpack_masks` is the inverse.

    Each bitmap gets a border of zeros and its box grows by one pixel on each side, so that the loss reads zero for
    points outside the box (`m2f_trainer.model.compact_masks.CompactMasks`).
    """
    sizes = torch.tensor([(bitmap.shape[0] + 2) * (bitmap.shape[1] + 2) for bitmap in bitmaps], dtype=torch.int64)
    offsets = torch.cumsum(sizes, dim=0) - sizes
    values = np.zeros(int(sizes.sum()), dtype=np.uint8)
    for bitmap, start in zip(bitmaps, offsets.tolist(), strict=True):
        height, width = bitmap.shape
        bordered = values[start : start + (height + 2) * (width + 2)].reshape(height + 2, width + 2)
        bordered[1:-1, 1:-1] = bitmap
    grown = boxes.to(torch.int64) + torch.tensor([-1, -1, 1, 1])
    return {"values": torch.from_numpy(values), "boxes": grown, "offsets": offsets}


def unpack_masks(packed: Mapping[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Dense masks, uint8 (T, H, W), for tests, pictures and code that needs them."""
    dense = torch.zeros((len(packed["offsets"]), height + 2, width + 2), dtype=torch.uint8)
    corners = zip(packed["boxes"].tolist(), packed["offsets"].tolist(), strict=True)
    for mask, ((x0, y0, x1, y1), offset) in zip(dense, corners, strict=True):
        count = (y1 - y0) * (x1 - x0)
        bitmap = packed["values"][offset : offset + count].view(y1 - y0, x1 - x0)
        mask[y0 + 1 : y1 + 1, x0 + 1 : x1 + 1] = bitmap
    return dense[:, 1:-1, 1:-1].to(packed["values"].device)
