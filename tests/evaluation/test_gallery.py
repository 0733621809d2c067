"""Ground truth beside prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import ImageError
from m2f_trainer.evaluation.gallery import GAP, ground_truth, pictures, rows_of_run, side_by_side
from m2f_trainer.inference.instances import Instances
from m2f_trainer.run_folder import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("gallery") / "set", images=(1, 2, 0))


def test_the_ground_truth_is_on_the_left_and_has_no_scores(data: Path) -> None:
    row = load_coco(data)["valid"][0]
    image = side_by_side(row, None, {}, 1000)
    assert image.size == (2 * row["width"] + GAP, row["height"])
    truth = ground_truth(row)
    assert len(truth) == sum(not item["iscrowd"] for item in row["objects"])
    left, right = np.asarray(image)[:, : row["width"]], np.asarray(image)[:, row["width"] + GAP :]
    assert (left != right).any(axis=2).mean() > 0.01, "nothing is drawn on the right"


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
