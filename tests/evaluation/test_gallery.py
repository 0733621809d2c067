"""Ground truth beside prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import ImageError
from m2f_trainer.evaluation.gallery import GAP, ground_truth, pictures, rows_of_run, side_by_side
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.run_folder import Run
from m2f_trainer.viz.overlay import color


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("gallery") / "set", images=(1, 2, 0))


def squares(size: tuple[int, int], category_ids: list[int], side: int) -> Instances:
    """Squares in rows, 5 pixels apart, one of each category id."""
    columns, rles = (size[1] - 5) // (side + 5), []
    for place in range(len(category_ids)):
        y, x = 5 + (place // columns) * (side + 5), 5 + (place % columns) * (side + 5)
        mask = np.zeros(size, np.uint8, order="F")
        mask[y : y + side, x : x + side] = 1
        rles.append({"size": list(size), "counts": coco_mask.encode(mask)["counts"]})
    return Instances(1, np.array(category_ids), np.linspace(0.9, 0.5, len(rles)), rles, tight_boxes(rles), size)


def test_the_ground_truth_is_on_the_left_and_has_no_scores(data: Path) -> None:
    row = load_coco(data)["valid"][0]
    image = side_by_side(row, None, {}, 1000)
    assert image.size == (2 * row["width"] + GAP, row["height"])
    truth = ground_truth(row)
    assert len(truth) == sum(not item["iscrowd"] for item in row["objects"])
    left, right = np.asarray(image)[:, : row["width"]], np.asarray(image)[:, row["width"] + GAP :]
    assert (left != right).any(axis=2).mean() > 0.01, "nothing is drawn on the right"


def test_the_two_sides_name_their_classes_in_the_same_way(tmp_path: Path) -> None:
    """Labels fit on four large objects, but not on 30 small predictions: both sides are coloured by class.

    The predictions include a class that the split lacks.
    """
    size, names = (300, 400), {1: "cat", 2: "dog", 5: "owl"}
    truth = squares(size, [5, 2, 1, 5], 90)
    found = squares(size, [1, 2, 5, 3] * 7, 20)
    Image.new("RGB", (400, 300), (60, 60, 60)).save(tmp_path / "photo.png")
    objects = [
        {"category_id": int(key), "counts": rle["counts"].decode(), "iscrowd": False}
        for key, rle in zip(truth.category_ids, truth.rles, strict=True)
    ]
    row = {"image_id": 1, "height": 300, "width": 400, "image": {"path": str(tmp_path / "photo.png")}}
    picture = np.asarray(side_by_side({**row, "objects": objects}, found, names, 400))
    legend = {tuple(pixel) for pixel in picture[301:].reshape(-1, 3).tolist()}
    for half, left in ((truth, 0), (found, 400 + GAP)):
        for key, box in zip(half.category_ids.tolist(), half.boxes, strict=True):
            outline = tuple(picture[int(box[1]), left + int(box[0])].tolist())
            assert outline == color(sorted([1, 2, 3, 5]).index(key)), "the colour of the class"
            assert outline in legend
    alone = np.asarray(side_by_side({**row, "objects": objects}, None, names, 400))
    assert alone.shape[0] == 300, "nothing was predicted, and the labels of the objects fit"


def test_an_image_of_another_size_than_was_predicted_is_refused(data: Path) -> None:
    row = load_coco(data)["valid"][0]
    nothing = Instances(row["image_id"], np.zeros(0, np.int64), np.zeros(0), [], np.zeros((0, 4)), (9, 9))
    with pytest.raises(ImageError, match=r"predicted at 9x9 pixels, and now has .*: the dataset has changed since"):
        side_by_side(row, nothing, {}, 1000)


def test_pictures_are_of_the_entries_whose_images_the_dataset_still_has(data: Path) -> None:
    rows = load_coco(data)["valid"]
    shown = [
        {"image_id": image_id, "predictions": []} for image_id in (rows[1]["image_id"], 10**6, rows[0]["image_id"])
    ]
    made = pictures(rows, shown, categories_of(rows), longest=50)
    assert [entry["image_id"] for _, _, entry in made] == [rows[1]["image_id"], rows[0]["image_id"]]
    assert [name for name, _, _ in made] == [Path(rows[k]["image"]["path"]).name for k in (1, 0)]
    assert all(image.width <= 2 * 50 + GAP for _, image, _ in made)


def test_a_runs_rows_are_its_valid_split_or_none_where_that_is_not_here(data: Path, tmp_path: Path) -> None:
    def rows(**recipe: object) -> list[int] | None:
        found = rows_of_run(Run("a", tmp_path, {}, {}, recipe, {}))
        return None if found is None else list(found["image_id"])

    assert rows(dataset_name=str(data)) == list(load_coco(data)["valid"]["image_id"])
    assert rows(dataset_name=str(tmp_path / "gone")) is None
    assert rows() is None
