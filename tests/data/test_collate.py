"""Batches hold every instance once, packed, in order; workers see the epoch change."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from m2f_trainer.data.collate import InstanceDataset, collate, object_counts, unpack_masks
from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.errors import DataError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return load_coco(write_sample(folder / "set", images=(12, 1, 0)), cache_dir=folder / "cache")["train"]


def test_a_batch_holds_every_instance_of_its_images_in_order(rows):
    data = InstanceDataset(rows, EvalTransform(64, 96), categories_of(rows))
    samples = [data[i] for i in range(len(data))]
    batch = collate(samples)
    assert batch["pixel_values"].shape == (12, 3, 64, 96)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_mask"].dtype == torch.bool
    assert batch["image_id"].tolist() == rows["image_id"][:]
    assert batch["original_size"].tolist() == [[row["height"], row["width"]] for row in rows]
    assert batch["resized_size"].tolist() == [list(sample["resized_size"]) for sample in samples]
    dense = unpack_masks(batch["mask_labels"], 64, 96)
    assert len(dense) == sum(len(labels) for labels in batch["class_labels"])
    flat = [(sample["boxes"][i], bitmap) for sample in samples for i, bitmap in enumerate(sample["masks"])]
    for mask, ((x0, y0, x1, y1), bitmap) in zip(dense, flat, strict=True):
        assert np.array_equal(mask[y0:y1, x0:x1], bitmap)
        assert mask.sum() == bitmap.sum()


def test_class_k_is_the_kth_category_and_crowds_never_come_through(rows):
    data = InstanceDataset(rows, EvalTransform(256, 256), categories_of(rows))
    assert [category.id for category in categories_of(rows)] == [1, 3, 7]
    assert any(entry["iscrowd"] for row in rows for entry in row["objects"])
    for i, row in enumerate(rows):
        expected = [[1, 3, 7].index(entry["category_id"]) for entry in row["objects"] if not entry["iscrowd"]]
        assert data[i]["class_labels"].tolist() == expected


def test_a_batch_without_objects_is_a_batch(rows):
    data = InstanceDataset(rows, EvalTransform(64, 64), categories_of(rows))
    empty = next(i for i, row in enumerate(rows) if not row["objects"])
    batch = collate([data[empty]])
    assert {key: tuple(value.shape) for key, value in batch["mask_labels"].items()} == {
        "values": (0,), "boxes": (0, 4), "offsets": (0,),
    }  # fmt: skip
    assert batch["mask_labels"]["values"].dtype == torch.uint8
    assert batch["mask_labels"]["offsets"].dtype == torch.int64
    assert batch["class_labels"][0].shape == (0,)


def test_a_category_the_model_does_not_know_is_refused(rows):
    data = InstanceDataset(rows, EvalTransform(64, 64), [Category(1, "circle")])
    with pytest.raises(DataError, match=r"image \d+: expected categories \[1\], got"):
        collate([data[i] for i in range(len(data))])


def test_workers_that_stay_see_the_epoch_and_their_number_changes_nothing(rows):
    def batches(workers: int) -> list[torch.Tensor]:
        data = InstanceDataset(rows, TrainTransform(48, 48, color_jitter=0.2, seed=3), categories_of(rows))
        stay = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(data, batch_size=4, collate_fn=collate, num_workers=workers, **stay)
        seen = []
        for epoch in range(2):
            data.set_epoch(epoch)
            for batch in loader:
                seen += [batch["pixel_values"].clone(), batch["mask_labels"]["values"].clone()]
        return seen

    alone, shared = batches(0), batches(1)
    assert len(alone) == 12
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0], alone[6])


def test_objects_are_counted_by_row_and_class_also_of_selected_rows(rows):
    categories = categories_of(rows)
    for some in (rows, rows.select([5, 0, 7]), rows.select([])):
        data = InstanceDataset(some, EvalTransform(64, 64), categories)
        kept = [[one["category_id"] for one in row["objects"] if not one["iscrowd"]] for row in some]
        assert data.objects().tolist() == list(map(len, kept))
        assert data.labels().tolist() == [[i, [1, 3, 7].index(key)] for i, ids in enumerate(kept) for key in ids]


def test_masks_of_more_than_two_gigabytes_of_text_are_not_joined():
    """The chunks share one buffer of 64 MiB, so that they take no memory until they are joined."""
    text = pa.array(["x" * 2**26, "y"])
    fields = {"category_id": pa.array([3, 5]), "iscrowd": pa.array([False, True]), "text": text}
    lists = pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays(list(fields.values()), list(fields)))
    many = datasets.Dataset(pa.table({"objects": pa.chunked_array([lists] * 40)}), fingerprint="many")
    assert object_counts(many).tolist() == [1, 0] * 40
