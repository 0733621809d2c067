"""A prepared dataset survives the Hub's format unchanged; other Hub datasets become rows; check works on both."""

import shutil

import datasets
import numpy as np
import pytest
from datasets.table import embed_table_storage
from PIL import Image

from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.hub_dataset import is_hub_name, load_dataset, load_hub
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.folders import SQUARE, annotation, content, write


def as_pushed(splits: datasets.DatasetDict, folder, files=1):
    """What `push_to_hub` uploads: parquet files with the images' bytes inside, and nothing of the info but features."""
    for split, rows in splits.items():
        shards = rows.with_format("arrow").map(
            embed_table_storage, batched=True, batch_size=100, load_from_cache_file=False
        )
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for k in range(min(files, len(rows))):
            part = shards.with_format(None).shard(files, k)
            part.to_parquet(folder / f"data/{split}-{k:05}-of-{files:05}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    splits = load_coco(write_sample(folder / "set", images=(12, 4, 0)), cache_dir=folder / "cache")
    name = as_pushed(splits, folder / "pushed")
    shutil.move(folder / "set", folder / "gone")  # only what was uploaded is left
    yield splits, name, folder
    shutil.move(folder / "gone", folder / "set")


def test_a_built_set_comes_back_from_the_hub_whole(built):
    splits, name, folder = built
    back = load_hub(name, cache_dir=str(folder / "other"))
    assert list(back) == ["train", "valid"]
    for split, rows in splits.items():
        assert categories_of(back[split]) == categories_of(rows)
        assert back[split]["objects"][:] == rows["objects"][:]
        assert back[split]["image_id"][:] == rows["image_id"][:]
    shutil.copytree(folder / "gone", folder / "set")
    for k in range(12):
        here, there = splits["train"][k], back["train"][k]
        assert there["image"]["bytes"]
        assert EvalTransform(64, 64)(there)["pixel_values"].equal(EvalTransform(64, 64)(here)["pixel_values"])
    shutil.rmtree(folder / "set")
    check_dataset(back)


def test_sparse_ids_and_similar_names_survive(tmp_path):
    names = [{"id": 90, "name": "größe"}, {"id": 7, "name": "Größe"}, {"id": 5, "name": "[1, x]"}]
    ones = [annotation(k, category_id=one["id"]) for k, one in enumerate(names, start=1)]
    splits = load_coco(write(tmp_path / "set", content(*ones, categories=names)), cache_dir=tmp_path / "cache")
    back = load_hub(as_pushed(splits, tmp_path / "pushed"), cache_dir=str(tmp_path / "other"))
    assert categories_of(back["train"]) == (Category(5, "[1, x]"), Category(7, "Größe"), Category(90, "größe"))


@pytest.mark.parametrize("form", ["list of objects", "object of lists"])
def test_image_and_objects_columns_of_another_making_become_rows(form, tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    polygons = datasets.List(datasets.List(datasets.Value("float64")))
    if form == "list of objects":
        fields = datasets.List({"category": label, "segmentation": polygons})
        objects = [{"category": 1, "segmentation": SQUARE}]
    else:
        fields = {"category": datasets.List(label), "segmentation": datasets.List(polygons)}
        objects = {"category": [1], "segmentation": [SQUARE]}
    image = Image.fromarray(np.arange(320, dtype=np.uint8).reshape(16, 20))
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    rows = datasets.Dataset.from_list([{"image": image, "objects": objects}] * 2, features=features)
    name = as_pushed(datasets.DatasetDict({"train": rows, "validation": rows}), tmp_path / "pushed")
    splits = load_hub(name, cache_dir=str(tmp_path / "cache"))
    assert list(splits) == ["train", "valid"]
    first, second = splits["train"]
    assert (first["height"], first["width"], first["image_id"], second["image_id"]) == (16, 20, 0, 1)
    assert first["objects"][0]["counts"] == masks.to_counts(SQUARE, 16, 20, "test")
    assert (first["objects"][0]["bbox"], first["objects"][0]["area"]) == ([2, 3, 10, 8], 80)
    assert first["objects"][0]["id"] != second["objects"][0]["id"]
    assert categories_of(splits["train"]) == (Category(1, "dog"),)
    check_dataset(splits)


def test_a_set_that_can_not_be_used_is_refused_with_what_it_has(tmp_path):
    rows = datasets.Dataset.from_list([{"image": "a", "label": 3}])
    name = as_pushed(datasets.DatasetDict({"train": rows}), tmp_path / "pushed")
    with pytest.raises(DataError, match="expected columns image and objects, found image, label"):
        load_hub(name, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="loading it failed"):
        load_hub(str(tmp_path / "nowhere"))


def test_a_name_is_the_hubs_only_where_no_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("user/name")
    assert not any(map(is_hub_name, ("name", "/user/name", "user/name/more", "./name", "../name", "user/")))
    write(tmp_path / "user/name", content())
    assert not is_hub_name("user/name")
    assert len(load_dataset("user/name")["train"]) == 1


def test_check_works_on_a_hub_set(built, monkeypatch):
    _, name, folder = built
    back = load_hub(name, cache_dir=str(folder / "third"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: back)
    examination = examine("user/name")
    assert examination.status == 0
    assert {split: len(scans) for split, scans in examination.scans.items()} == {"train": 12, "valid": 4}
