"""Images are found under every spelling that tools produce, and never chosen silently among candidates."""

import json
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.formats import find_splits, read_split
from m2f_trainer.data.image_names import ImageNames, is_inside, usual_name
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError, ImageError
from tests.data.exports import coco
from tests.data.honest import base, dataset, objects, picture

SETTINGS = Settings(64, 64)


def named(make):
    def change(coco):
        for image in coco["images"]:
            image["file_name"] = make(image["file_name"])

    return change


def with_address_only(coco):
    for image in coco["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"


SPELLINGS = {
    "s3": named(lambda name: f"s3://bucket/prefix/{name}"),
    "gs": named(lambda name: f"gs://bucket/{name}"),
    "https with a signature": named(lambda name: f"https://host.org/a/{name}?sig=a%2Fb&x=1#top"),
    "file": named(lambda name: f"file:///home/me/set/{name}"),
    "https, percent-encoded": named(lambda name: f"https://host/{name.replace('_', '%5F')}"),
    "percent-encoded": named(lambda name: name.replace("_", "%5f")),
    "upper case": named(str.upper),
    "upper-case ending": named(lambda name: name.replace(".png", ".PNG")),
    "other folders": named(lambda name: f"set/pictures/{name}"),
    "windows folders": named(lambda name: f"images\\{name}"),
    "more windows folders": named(lambda name: f"set\\Images\\{name}"),
    "windows path of another machine": named(lambda name: f"C:\\Users\\me\\set\\images\\{name}"),
    "windows share": named(lambda name: f"\\\\host\\share\\images\\{name}"),
    "absolute path of another machine": named(lambda name: f"/home/me/set/images/{name}"),
    "no ending": named(lambda name: name.removesuffix(".png")),
    "dots": named(lambda name: f"./././{name}"),
    "spaces around": named(lambda name: f" {name} "),
    "other folders and case": named(lambda name: f"Data/{name.upper()}"),
    "only an address": with_address_only,
    "local storage of Label Studio": named(lambda name: f"/data/local-files/?d=my%20set%2F{name.replace('_', '%5F')}"),
    "local storage with its server": named(lambda name: f"http://localhost:8080/data/local-files/?d=set%2F{name}"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_names_in_other_spellings_are_found_and_counted(case, tmp_path):
    expected = objects(dataset(tmp_path / "base"), tmp_path / "cache")
    root = dataset(tmp_path / "set", SPELLINGS[case])
    assert objects(root, tmp_path / "cache") == expected
    examination = examine(root, SETTINGS)
    assert examination.status == 0
    notes = {one.kind: one.count for one in examination.findings if one.severity == "note"}
    assert notes == ({} if case == "dots" else {"found-image": 6})
    repair(examination, tmp_path / "copy")
    assert objects(tmp_path / "copy", tmp_path / "cache") == expected
    assert not [one for one in examine(tmp_path / "copy", SETTINGS).findings if one.severity == "note"]


@pytest.mark.parametrize(("stored", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form_are_found(stored, written, tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: unicodedata.normalize(written, f"größe_é_{name}")))
    for path in (root / "images").iterdir():
        path.rename(path.with_name(unicodedata.normalize(stored, f"größe_é_{path.name}")))
    assert len(objects(root, tmp_path / "cache")) == 6


def test_names_without_their_percent_encoding_are_found(tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: f"my {name}"))
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"my%20{path.name}"))
    assert len(objects(root, tmp_path / "cache")) == 6


@pytest.mark.parametrize("folders", [("train", "val"), ("images/batch1", "images/batch2"), ("a/b/c", "d")])
def test_bare_names_are_found_in_several_folders(folders, tmp_path):
    expected = objects(dataset(tmp_path / "base"), tmp_path / "cache")
    root = dataset(tmp_path / "set")
    for k, path in enumerate(sorted((root / "images").iterdir())):
        (root / folders[k % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(root / folders[k % 2] / path.name)
    assert objects(root, tmp_path / "cache") == expected
    repair(examine(root, SETTINGS), tmp_path / "copy")
    assert objects(tmp_path / "copy", tmp_path / "cache") == expected


@pytest.mark.parametrize("folders", [("train", "val"), ("images/batch1", "images/batch2"), ("a", "b")])
def test_a_bare_name_in_two_folders_is_refused_with_both_files(folders, tmp_path):
    root = dataset(tmp_path / "set")
    for k, path in enumerate(sorted((root / "images").iterdir())):
        (root / folders[k % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(root / folders[k % 2] / path.name)
    for folder in folders:
        picture(root / folder / "img_3.png", (20, 16) if folder == folders[0] else (16, 20))
    with pytest.raises(DataError, match=rf"(?s){folders[0]}.*{folders[1]}"):
        objects(root, tmp_path / "cache")
    assert examine(root, SETTINGS).status == 1


def test_the_longest_common_path_decides_between_files_of_one_name(tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: f"export/images/{name}"))
    (root / "masks").mkdir()
    for path in (root / "images").iterdir():
        Image.new("L", (20, 16)).save(root / "masks" / path.name)
    assert len(objects(root, tmp_path / "cache")) == 6
    assert {scan.source["path"].split("/")[-2] for scan in examine(root, SETTINGS).scans["train"]} == {"images"}


@pytest.mark.parametrize(("photos", "labels"), [("rgb", "masks"), ("photos", "annotated"), ("b/photos", "a/labels")])
def test_label_pictures_of_the_same_names_are_never_taken_silently(photos, labels, tmp_path):
    root = dataset(tmp_path / "set", folder=photos)
    for image in base()["images"]:
        (root / labels).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(16, 20, dtype=np.uint8) * 255).save(root / labels / image["file_name"])
    with pytest.raises(DataError, match=r"(masks|annotated|labels).*") as error:
        objects(root, tmp_path / "cache")
    assert photos in str(error.value)
    assert examine(root, SETTINGS).status > 0


@pytest.mark.parametrize("labels", ["masks", "annotated", "a"])
def test_the_usual_folder_is_taken_with_a_warning_that_names_the_other(labels, tmp_path):
    root = dataset(tmp_path / "set")
    for image in base()["images"]:
        (root / labels).mkdir(exist_ok=True)
        Image.fromarray(np.eye(16, 20, dtype=np.uint8) * 255).save(root / labels / image["file_name"])
    assert len(objects(root, tmp_path / "cache")) == 6
    examination = examine(root, SETTINGS)
    (warning,) = [one for one in examination.findings if one.kind == "other-image-folder"]
    assert str(root / labels) in warning.message
    assert {scan.source["path"].split("/")[-2] for scan in examination.scans["train"]} == {"images"}


def test_copies_of_the_images_in_another_folder_are_no_question(tmp_path):
    root = dataset(tmp_path / "set", folder="a")
    dataset(root, folder="b")
    assert len(objects(root, tmp_path / "cache")) == 6


@pytest.mark.parametrize("folders", ["images/{}", "{}"])
def test_the_files_of_another_split_are_not_taken_by_their_names_alone(folders, tmp_path):
    """Frames of several videos have the same names; one that is missing must not be replaced by another video's."""
    for split, numbers in (("train", (0, 1, 3, 4)), ("val", (2, 5))):
        for k in numbers:
            picture(tmp_path / "set" / folders.format(split) / f"frame_{k}.png")
        names = [f"frame_{k}.png" for k in (range(5) if split == "train" else numbers)]
        path = tmp_path / "set/annotations" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco(names)))
    with pytest.raises(DataError, match=r"image 3: no file of this split has the name 'frame_2\.png'\. .*val"):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    (error,) = [one for one in examine(tmp_path / "set", SETTINGS).findings if one.severity == "error"]
    assert (error.kind, error.ids) == ("missing-image", [3])


@pytest.mark.parametrize("spelling", ["job 1\\{}.png", "Job 1/{}.PNG", "data/job 1/{}.png", "job 1/{}"])
def test_a_name_in_another_spelling_is_of_its_own_split_where_all_have_the_same_folders(spelling, tmp_path):
    """CVAT's exports of tasks with folders; all frames have the same names."""
    for split in ("Train", "Validation"):
        for k in range(3):
            picture(tmp_path / "set/images" / split / "job 1" / f"{k}.png")
        path = tmp_path / "set/annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco([spelling.format(k) for k in range(3)])))
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    for split, folder in (("train", "Train"), ("valid", "Validation")):
        paths = [row["image"]["path"].split("/images/")[1] for row in splits[split]]
        assert paths == [f"{folder}/job 1/{k}.png" for k in range(3)]
    (tmp_path / "set/images/Train/job 1/2.png").unlink()
    with pytest.raises(DataError, match=r"image 3: no file of this split has the name .*Validation/job 1/2\.png"):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("folders", ["train/cam", "images/train/cam", "train/a/cam"])
def test_images_below_the_folder_of_another_split_are_found_where_a_split_has_no_folder(folders, tmp_path):
    for split in ("train", "valid"):
        names = [f"cam/{split}_{k}.png" for k in range(3)]
        for name in names:
            picture(tmp_path / "set" / folders / name.removeprefix("cam/"))
        path = tmp_path / "set/annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco(names)))
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    for split, rows in splits.items():
        paths = [row["image"]["path"].split("/set/")[1] for row in rows]
        assert paths == [f"{folders}/{split}_{k}.png" for k in range(3)]
    examination = examine(tmp_path / "set", SETTINGS)
    assert examination.status == 0
    assert {one.kind: one.count for one in examination.findings if one.severity == "note"}["found-image"] >= 3
    picture(tmp_path / "set/pictures/cam/valid_0.png", (16, 20))
    rows = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")["valid"]
    assert rows[0]["image"]["path"].endswith("set/pictures/cam/valid_0.png"), "a file of no other split comes first"


@pytest.mark.parametrize(("prefix", "folder"), [("", ""), ("scenes/", "images/"), ("/home/me/scenes/", "images/")])
def test_one_folder_an_image_takes_time_in_proportion_to_the_images(prefix, folder, tmp_path):
    names = [f"{k:06d}/rgb.png" for k in range(800)]
    picture(tmp_path / "one.png")
    for name in names:
        (tmp_path / "set" / folder / name).parent.mkdir(parents=True)
        (tmp_path / "set" / folder / name).write_bytes((tmp_path / "one.png").read_bytes())
    (tmp_path / "set/annotations.json").write_text(json.dumps(coco([prefix + name for name in names])))
    start = time.process_time()
    (files,) = find_splits(tmp_path / "set").splits
    split = read_split(files)
    assert time.process_time() - start < 5, "it takes 0.2 s; 20 s if each name is compared with each folder"
    assert [split.source(image)["path"].split("/")[-2] for image in split.images] == [name[:6] for name in names]


@pytest.mark.parametrize("labels", ["masks", "images/small"])
def test_a_missing_image_is_not_replaced_by_another_version_of_it(labels, tmp_path):
    root = dataset(tmp_path / "set")
    (root / labels).mkdir()
    for image in base()["images"][2:]:
        Image.fromarray(np.eye(16, 20, dtype=np.uint8) * 255).save(root / labels / image["file_name"])
    (root / "images/img_3.png").unlink()
    if labels == "masks":  # found before the image folder is known to lack images: both are named
        with pytest.raises(DataError, match=r"images and .*masks both have 'img_2\.png'"):
            load_coco(root, cache_dir=tmp_path / "cache")
        return
    with pytest.raises(ImageError, match=r"img_3\.png can't be read"):
        check_dataset(load_coco(root, cache_dir=tmp_path / "cache", images=None))
    (error,) = [one for one in examine(root, SETTINGS).findings if one.severity == "error"]
    assert (error.kind, error.ids) == ("missing-image", [4])


def test_a_mask_is_not_taken_for_the_missing_image_whose_name_it_extends(tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: name.replace(".png", ".jpg")))
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"{path.stem}.jpg.png"))
    with pytest.raises(ImageError, match=r"img_0\.jpg can't be read"):
        check_dataset(load_coco(root, cache_dir=tmp_path / "cache"))
    assert {one.kind for one in examine(root, SETTINGS).findings} >= {"missing-image"}


def test_images_in_a_folder_that_all_splits_share_are_found(tmp_path):
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        names = [f"{k}.png" for k in numbers]
        for name in names:
            picture(tmp_path / "set/pictures" / name)
        (tmp_path / "set" / split).mkdir()
        (tmp_path / "set" / split / "labels.json").write_text(json.dumps(coco(names)))
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "valid": 2}
    assert examine(tmp_path / "set", SETTINGS).status == 0
    files = {split: f"{split}/labels.json" for split in ("train", "val")}
    assert len(load_coco(tmp_path / "set", cache_dir=tmp_path / "cache", annotations=files)["train"]) == 5


def test_an_image_folder_that_is_a_link_out_of_the_dataset_needs_the_switch(tmp_path):
    root = dataset(tmp_path / "set")
    (root / "images").rename(tmp_path / "store")
    (root / "images").symlink_to(tmp_path / "store")
    (tmp_path / "link").symlink_to(root)
    for path in (root, root / "annotations.json", tmp_path / "link"):
        with pytest.raises(DataError, match=r"images: the image folder leads out of .*, to .*store\. .*--follow_links"):
            load_coco(path, cache_dir=tmp_path / "cache")
        assert len(load_coco(path, cache_dir=tmp_path / "cache", follow_links=True)["train"]) == 5
        given = load_coco(path, cache_dir=tmp_path / "cache", images={"train": tmp_path / "store"})
        assert len(given["train"]) == 5, "a folder that is named may lie anywhere"
    (root / "images").unlink()
    (tmp_path / "store").rename(root / "store")
    (root / "images").symlink_to(root / "store")
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"]) == 5, "a link inside the dataset is no question"


def test_copies_of_one_image_in_two_folders_are_no_question(tmp_path):
    root = dataset(tmp_path / "set", folder="images/batch1")
    (root / "images/batch2").mkdir()
    (root / "images/batch2/img_0.png").write_bytes((root / "images/batch1/img_0.png").read_bytes())
    assert len(objects(root, tmp_path / "cache")) == 6


def test_two_names_for_one_file_are_refused(tmp_path):
    def change(coco):
        coco["images"][0]["file_name"] = "first/img_7.png"
        coco["images"][1]["file_name"] = "second/img_7.png"

    root = dataset(tmp_path / "set", change)
    picture(root / "images/img_7.png")
    with pytest.raises(DataError, match=r"no file has the name 'first/img_7\.png'.*may also be second/img_7\.png"):
        objects(root, tmp_path / "cache")


def test_a_name_that_only_differs_in_case_from_two_files_is_refused(tmp_path):
    root = dataset(tmp_path / "set", lambda coco: coco["images"][0].update(file_name="Img_0.png"))
    picture(root / "images/IMG_0.png")
    with pytest.raises(DataError, match=r"'Img_0\.png'; it may be .*IMG_0\.png"):
        objects(root, tmp_path / "cache")


@pytest.mark.parametrize(
    "name",
    [
        "https://host/../../secret.png",
        "https://host/%2e%2e/%2e%2e/secret.png",
        "s3://b/..%5csecret.png",
        "/data/local-files/?d=..%2F..%2Fsecret.png",
        "/data/local-files/?d=%2Fetc%2Fsecret.png",
    ],
)
def test_an_address_finds_nothing_outside_and_no_link(name, tmp_path):
    root = dataset(tmp_path / "set", lambda coco: coco["images"][0].update(file_name=name))
    picture(tmp_path / "secret.png")
    (root / "images/secret.png").symlink_to(tmp_path / "secret.png")
    examination = examine(root, SETTINGS)
    assert {"missing-image", "unsafe-path"} & {one.kind for one in examination.findings}
    assert not any("secret" in str(scan.source) for scans in examination.scans.values() for scan in scans)


def test_hidden_folders_are_not_searched(tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: f"x/{name}"))
    for folder in ("__MACOSX/images", ".cache"):
        picture(root / folder / "img_0.png", (16, 20))
    picture(root / "images/._img_1.png")
    assert len(objects(root, tmp_path / "cache")) == 6


def test_the_cache_follows_the_names_of_the_files(tmp_path):
    root = dataset(tmp_path / "set", named(lambda name: f"x/{name}"))
    (root / "images/img_0.png").rename(tmp_path / "away.png")
    assert "img_0.png" in {file for file, _, _ in objects(root, tmp_path / "cache")}, "refused when images are checked"
    (tmp_path / "away.png").rename(root / "images/IMG_0.png")
    assert "IMG_0.png" in {file for file, _, _ in objects(root, tmp_path / "cache")}


def test_names_and_folders_are_distinguished(tmp_path):
    assert [is_inside(name) for name in ("a/b.png", "../a", "/a", "a\\b", "a\0", "..a")] == [True, *[False] * 4, True]
    assert usual_name({"file_name": "", "coco_url": "http://h/a.png"}) == "http://h/a.png"
    assert usual_name({"file_name": 3}) is None
    with pytest.raises(DataError, match="found none of its image folders"):
        ImageNames([tmp_path / "gone"], tmp_path / "a.json", "train")
