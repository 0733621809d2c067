"""YOLO segmentation folders become the same rows as COCO ones, or are refused with file, line and remedy."""

import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.data.yolo import find_yolo, read_yolo
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks

LINE = "1 0.1 0.25 0.6 0.25 0.6 0.75 0.1 0.75"
YAML = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n"


def yolo(root: Path, label: str = LINE, yaml: str = YAML, pattern: str = "images/{}") -> Path:
    """Two splits of an image with a label and one without."""
    for k, split in enumerate(("train", "val")):
        folder = root / pattern.format(split)
        labels = Path(str(folder).replace("images", "labels"))
        for made in (folder, labels):
            made.mkdir(parents=True, exist_ok=True)
        for j, name in enumerate(("a.jpg", "b.png")):
            noise = np.random.default_rng(2 * k + j).integers(0, 255, size=(16, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((100, 80), Image.Resampling.NEAREST).save(folder / name)
        (labels / "a.txt").write_text(label + "\n")
    (root / "data.yaml").write_text(yaml)
    return root


@pytest.mark.parametrize(
    ("yaml", "pattern"),
    [
        (YAML, "images/{}"),
        ("train: ../train/images\nval: ../val/images\nnames:\n  0: cat\n  1: dog\n", "{}/images"),  # Roboflow
        ("train: train\nval: val\nnames: [cat, dog]\n", "{}/images"),
        (YAML.replace("val:", "validation:"), "images/{}"),
    ],
)
def test_a_folder_becomes_rows_with_masks_in_pixels(yaml, pattern, tmp_path):
    splits = load_coco(yolo(tmp_path / "set", yaml=yaml, pattern=pattern), cache_dir=tmp_path / "cache")
    assert list(splits) == ["train", "valid"]
    first, second = splits["train"]
    assert Path(first["image"]["path"]).name == "a.jpg"
    assert (first["image_id"], first["height"], first["width"]) == (1, 80, 100)
    (one,) = first["objects"]
    expected = np.zeros((80, 100), dtype=np.uint8)
    expected[20:60, 10:60] = 1
    assert np.array_equal(masks.decode(one["counts"], 80, 100), expected)
    assert (one["category_id"], one["bbox"], one["area"], one["iscrowd"]) == (1, [10, 20, 50, 40], 2000, False)
    assert second["objects"] == []
    assert categories_of(splits["train"]) == (Category(1, "dog"),)


def test_a_folder_made_on_windows_is_read_as_any_other(tmp_path):
    root = yolo(tmp_path / "set", yaml="train: images\\train\r\nval: .\\images\\val\r\nnames: [cat, dog]\r\n")
    (root / "labels/train/a.txt").write_bytes(b"\xef\xbb\xbf" + f"{LINE}\r\n{LINE}\r\n".encode())  # as Notepad saves it
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [2, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_in_another_encoding_is_reported(tmp_path):
    root = yolo(tmp_path / "set")
    (root / "images/train/b.png").rename(root / "images/train" / os.fsdecode(b"\xe9.png"))
    with pytest.raises(DataError, match=r"isn't UTF-8\. Rename the file"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert [len(images) for images in examine(root).scans.values()] == [1, 2]


def test_the_cache_follows_labels_and_images(tmp_path):
    root = yolo(tmp_path / "set")
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"][0]["objects"]) == 1
    (root / "labels/train/a.txt").write_text(f"{LINE}\n{LINE}\n")
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"][0]["objects"]) == 2
    Image.open(root / "images/train/a.jpg").resize((50, 40)).save(root / "images/train/a.jpg")
    check_dataset(load_coco(root, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.2 0.2", "got a box of four numbers. Export it for segmentation"),
        ("1 0.1 0.1 0.5", "at least three points"),
        ("1", "at least three points"),
        ("1 0.1 0.1 0.5 0.1 0.5 0.5 0.3", "got 7 numbers"),
        ("dog 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class number"),
        ("-1 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class number"),
        ("1.5 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class number"),
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "class 7 isn't among the 2 names"),
        ("dog 0.1 0.1 0.5 0.1 0.5 0.5", "got 'dog'"),
        ("1 0.1 nan 0.5 0.1 0.5 0.5", r"expected numbers with a decimal point, such as 0\.25, got 'nan'"),
        ("1 0.1 inf 0.5 0.1 0.5 0.5", "expected numbers.*got 'inf'"),
        ("1 0.1 0,1 0.5 0.1 0.5 0.5", "expected numbers.*got '0,1'. Correct the line"),
        ("1 0.1 0.1 0.5.3 0.1 0.5 0.5", "expected numbers.*got '0.5.3'"),
        ("1 . 0.1 0.5 0.1 0.5 0.5", r"expected numbers.*got '\.'"),
        ("1 0.1 1.2.3e5 0.5 0.1 0.5 0.5", "expected numbers.*got '1.2.3e5'"),
        ("1.2.3 0.1 0.1 0.5 0.1 0.5 0.5", "expected a class number first, got '1.2.3'"),
        ("1 10 20 60 20 60 60", "expected fractions.*got 10"),
        ("1 0.1 0.1 0.5 0.1 0.5 1e400", "expected fractions.*got inf"),
    ],
)
def test_a_faulty_label_is_refused_with_its_file_and_line(line, message, tmp_path):
    root = yolo(tmp_path / "set", f"{LINE}\n\n{line}")
    with pytest.raises(DataError, match=rf"labels/train/a\.txt, line 3: .*{message}"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert {finding.severity for finding in examine(root).findings} >= {"error"}


def test_an_outline_takes_little_more_memory_than_its_numbers(tmp_path):
    """8 bytes for each number; as a list of Python's floats it takes 32."""
    count = 50_000
    (files, _) = find_yolo(yolo(tmp_path, " ".join(["0", *["0.123456"] * count])))
    tracemalloc.start()
    split = read_yolo(files)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(split.annotations[1][0]["segmentation"][0]) == count
    assert kept < 12 * count


def test_numbers_in_every_usual_spelling_are_read(tmp_path):
    root = yolo(tmp_path / "set", "1.0 +0.10 .25 6e-1 2.5E-1 0.6 .75 1.e-1 0.75")
    (one,) = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]["objects"]
    assert (one["category_id"], one["bbox"], one["area"]) == (1, [10, 20, 50, 40], 2000)


def test_a_validation_folder_that_does_not_exist_is_refused_with_both_ways_out(tmp_path):
    root = yolo(tmp_path / "set")
    shutil.rmtree(root / "images/val")
    with pytest.raises(
        DataError, match=r"images/val of 'valid' doesn't exist\. Correct its path or remove the line: a"
    ):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_labels_of_boxes_only_are_refused_with_what_adds_outlines(tmp_path):
    root = yolo(tmp_path / "set", "1 0.5 0.5 0.2 0.2\n\n0 0.1 0.1 0.2 0.2")
    with pytest.raises(
        DataError, match=r"labels/train: .* box of four numbers, in all 2 lines: .* boxes only\. Add out"
    ):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert {one.kind for one in examine(root).findings} == {"unusable"}


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat\n", "can't be read as YAML"),
        ("!!python/object/apply:os.system ['echo']\n", "can't be read as YAML"),
        ("- a\n", "got a list"),
        ("train: images/train\n", "expected `names`"),
        ("train: images/train\nnames: {a: cat}\n", "expected `names`"),
        ("train: images/none\nnames: [cat, dog]\n", "doesn't exist"),
        ("train: a/../../../..\nnames: [cat, dog]\n", "leads out of"),
        ("train: /etc\nnames: [cat, dog]\n", "leads out of"),
        ("train: [images/train, b]\nnames: [cat, dog]\n", "image folder .*/b of 'train' doesn't exist"),
        ("train: 3\nnames: [cat, dog]\n", "Name one folder"),
        ("train: images/train\nnames: {0: cat, '0': dog}\n", "expected `names`"),
        ("train: train.txt\nnames: [cat, dog]\n", "Name one folder"),
    ],
)
def test_a_faulty_yaml_is_refused(yaml, message, tmp_path):
    root = yolo(tmp_path / "set", yaml=yaml)
    with pytest.raises(DataError, match=message):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert examine(root).status == 2


def test_check_works_on_it_and_corrects_it_into_coco(tmp_path):
    root = yolo(tmp_path / "set", f"{LINE}\n7 0.1 0.1 0.5 0.1 0.5 0.5")
    (root / "images/train/c.png").write_bytes(b"")
    examination = examine(root)
    assert {one.kind for one in examination.findings} == {"unknown-category", "bad-image", "unused-category"}
    assert len(examination.scans["train"]) == 2
    repair(examination, tmp_path / "coco")
    assert examine(tmp_path / "coco").findings == ()
    rows = load_coco(tmp_path / "coco", cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [1, 0]


def test_a_text_file_may_list_the_pictures_of_a_split(tmp_path, monkeypatch):
    """CVAT's Ultralytics export."""
    root = yolo(tmp_path / "set", yaml="train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    (root / "train.txt").write_text("data/images/train/a.jpg\n")
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert [Path(row["image"]["path"]).name for row in splits["train"]] == ["a.jpg"]
    assert len(splits["train"][0]["objects"]) == 1
    (root / "train.txt").write_text(str(root.resolve() / "images/train/a.jpg"))
    monkeypatch.chdir(tmp_path)
    assert len(load_coco("set", cache_dir=tmp_path / "cache")["train"][0]["objects"]) == 1
    for text, message in (
        ("/etc/images/hostname", "isn't in"),
        ("images/train/gone.jpg", "isn't in"),
        ("", "found none"),
        ("../secret.png", "isn't in"),
    ):
        (tmp_path / "secret.png").write_bytes(b"")
        (root / "train.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            load_coco(root, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("yaml", "pattern"),
    [
        ("path: /content/data\ntrain: /content/data/train/images\nval: C:\\data\\val\\images\n", "{}/images"),
        ("path: dataset\ntrain: images/train\nval: images/val\n", "dataset/images/{}"),
        ("path: dataset\ntrain: dataset/images/train\nval: images/val\n", "dataset/images/{}"),
        ("train: Images/train\nval: images/val\n", "images/{}"),
    ],
)
def test_paths_of_another_machine_and_below_path_are_found(yaml, pattern, tmp_path):
    root = yolo(tmp_path / "set", yaml=f"{yaml}names: {{'0': cat, '1': dog}}\n", pattern=pattern)
    if "Images" in yaml:
        for name in ("images", "labels"):
            (root / name.capitalize()).mkdir()
            (root / name / "train").rename(root / name.capitalize() / "train")
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert {split: [len(row["objects"]) for row in rows] for split, rows in splits.items()} == {
        "train": [1, 0],
        "valid": [1, 0],
    }
    assert categories_of(splits["train"]) == (Category(1, "dog"),)


def test_an_absolute_path_is_not_replaced_by_a_folder_of_all_splits(tmp_path):
    root = yolo(tmp_path / "set", yaml="train: /content/train/images\nnames: [cat, dog]\n")
    with pytest.raises(DataError, match="'/content/train/images' of 'train' leads out of"):
        load_coco(root, cache_dir=tmp_path / "cache")


def counts(root, tmp_path):
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    return {split: [len(row["objects"]) for row in rows] for split, rows in splits.items()}


def test_the_datasets_own_folder_is_used_in_any_spelling_and_beside_a_copy_of_it(tmp_path, monkeypatch):
    root = yolo(tmp_path / "set")
    (root / "data.yaml").write_text(YAML.replace("path: .", f"path: {root}"))
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for name in ("set", root, "link", "copy"):
        assert counts(name, tmp_path) == {"train": [1, 0], "valid": [1, 0]}
    (root / "data.yaml").write_text(f"train: {root}/images/train\nval: {root}/images/val\nnames: [cat, dog]\n")
    for name in ("set", root, "link"):
        assert counts(name, tmp_path) == {"train": [1, 0], "valid": [1, 0]}


def test_a_path_of_another_machine_does_not_become_a_folder_of_all_splits(tmp_path, caplog):
    root = yolo(tmp_path / "set")
    (root / "data.yaml").write_text(f"{YAML}test: /content/ds/images\n")
    assert counts(root, tmp_path) == {"train": [1, 0], "valid": [1, 0]}
    assert "the test split '/content/ds/images' doesn't exist and is left out" in caplog.text
    (root / "data.yaml").write_text("train: /home/a/images\nval: /home/b/images\nnames: [cat, dog]\n")
    with pytest.raises(DataError, match="'/home/a/images' of 'train' leads out of"):
        counts(root, tmp_path)


def test_a_missing_image_of_a_list_is_not_replaced_by_another_of_its_name(tmp_path):
    root = yolo(tmp_path / "set", yaml=YAML.replace("images/train", "train.txt"))
    (root / "images/train/a.jpg").rename(root / "a.jpg")
    (root / "train.txt").write_text("./images/train/a.jpg\n./images/train/b.png\n")
    with pytest.raises(DataError, match=r"the image './images/train/a\.jpg' isn't in"):
        counts(root, tmp_path)


def test_a_list_outside_of_the_folder_is_not_read(tmp_path):
    root = yolo(tmp_path / "set", yaml=YAML.replace("images/train", "images/../../secret.txt"))
    (tmp_path / "secret.txt").write_text("password\n")
    with pytest.raises(DataError, match="the list of images leads out of") as error:
        counts(root, tmp_path)
    assert "password" not in str(error.value)


def test_labels_may_be_beside_the_images_of_a_folder_called_images_with_a_capital(tmp_path):
    root = yolo(tmp_path / "set", yaml=YAML.replace("images", "Images"))
    for split in ("train", "val"):
        (root / "labels" / split / "a.txt").rename(root / "images" / split / "a.txt")
    (root / "images").rename(root / "Images")
    shutil.rmtree(root / "labels")
    assert counts(root, tmp_path) == {"train": [1, 0], "valid": [1, 0]}


@pytest.mark.parametrize("pattern", ["images/{}", "{}/images"])
def test_a_split_may_have_several_folders_and_lists(pattern, tmp_path):
    root = yolo(tmp_path / "set", pattern=pattern)
    folders = [pattern.format(split) for split in ("train", "val")]
    (root / "list.txt").write_text(f"/content/ds/{folders[1]}/a.jpg\n")
    for second, objects in ((folders[1], [1, 0, 1, 0]), ("list.txt", [1, 0, 1])):
        (root / "data.yaml").write_text(f"train: [{folders[0]}, {second}]\nval: {folders[1]}\nnames: [cat, dog]\n")
        splits = load_coco(root, cache_dir=tmp_path / "cache")
        assert [len(row["objects"]) for row in splits["train"]] == objects
        assert splits["train"][2]["image"]["path"] == str((root / folders[1] / "a.jpg").resolve())
        assert "not used" not in examine(root).files


def test_a_list_may_have_a_folder_called_images_in_any_place(tmp_path):
    """CVAT's Ultralytics export of a task with folders, which has its labels below labels/train/images."""
    root = yolo(tmp_path / "set", yaml="path: .\ntrain: train.txt\nnames: [cat, dog]\n")
    for kind, name in (("images", "a.jpg"), ("images", "b.png"), ("labels", "a.txt")):
        (root / kind / "train/images/batch 1").mkdir(parents=True, exist_ok=True)
        (root / kind / "train" / name).rename(root / kind / "train/images/batch 1" / name)
    lines = [f"data/images/train/images/batch 1/{name}" for name in ("a.jpg", "b.png")]
    (root / "train.txt").write_text("\n".join(lines))
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [1, 0]
    (root / "labels/train/images/batch 1/a.txt").rename(root / "images/train/images/batch 1/a.txt")
    (root / "images/train/labels/batch 1").mkdir(parents=True)
    (root / "images/train/images/batch 1/a.txt").rename(root / "images/train/labels/batch 1/a.txt")
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [1, 0], "as Ultralytics looks for it: beside the last images"


def test_the_objects_of_an_unreadable_image_are_counted(tmp_path):
    root = yolo(tmp_path / "set", f"{LINE}\n{LINE.replace('1 ', '0 ', 1)}")
    (root / "labels/train/b.txt").write_text(LINE)
    (root / "images/train/a.jpg").write_bytes(b"")
    text = repair(examine(root), tmp_path / "copy").to_text()
    assert "train: 1 of 2 images, 1 of 3 objects" in text
    assert "left out: annotations 1, 2" in text


@pytest.mark.parametrize("split", ["", "train/"])
def test_class_names_in_a_text_file_do_as_well_as_a_yaml(split, tmp_path):
    """Label Studio's export."""
    root = yolo(tmp_path / "set")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "notes.json").write_text('{"categories": [], "info": {}}')
    if not split:
        for kind in ("images", "labels"):
            for file in (root / kind / "train").iterdir():
                file.rename(root / kind / file.name)
            for folder in ("train", "val", "test"):
                shutil.rmtree(root / kind / folder, ignore_errors=True)
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert len(rows[0]["objects"]) == 1
    assert {one.name for one in categories_of(rows)} <= {"cat", "dog"}


def test_a_yaml_of_another_name_is_found_if_it_is_the_only_one(tmp_path):
    root = yolo(tmp_path / "set")
    (root / "data.yaml").rename(root / "cells-seg.yaml")
    (root / "hyper.yaml").write_text("lr0: 0.01\n")
    (root / "broken.yaml").write_text("[")
    assert list(load_coco(root, cache_dir=tmp_path / "cache")) == ["train", "valid"]
    shutil.copy(root / "cells-seg.yaml", root / "other.yaml")
    with pytest.raises(DataError, match="found no annotations"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_a_test_split_that_does_not_exist_is_left_out(tmp_path, caplog):
    root = yolo(tmp_path / "set", yaml="train: images/train\ntest: ../test/images\nnames: [cat, dog]\n")
    assert "test" not in load_coco(root, cache_dir=tmp_path / "cache")
    assert "the test split '../test/images' doesn't exist and is left out" in caplog.text


def test_the_name_of_a_folder_above_the_dataset_changes_nothing(tmp_path):
    root = yolo(tmp_path / "set", yaml="train: train\nval: val\nnames: [cat, dog]\n", pattern="{}/images")
    (tmp_path / "images").mkdir()
    root = root.rename(tmp_path / "images/set")
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"][0]["objects"]) == 1
