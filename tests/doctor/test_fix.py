"""A corrected copy has none of the problems that can be corrected, and the original stays as it is."""

import json
import re
import shlex

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.cli.main import main
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.problems import KINDS
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError
from tests.data.folders import annotation, content, needs_real_data, write
from tests.data.honest import SQUARE, base, dataset, objects, picture
from tests.data.test_hub_dataset import as_pushed
from tests.doctor.test_examine import PLANTS, change, copied

SETTINGS = Settings(64, 64)


@needs_real_data
@pytest.mark.parametrize("kind", [kind for kind in PLANTS if KINDS[kind].fix])
def test_a_corrected_copy_is_clean_of_what_was_planted_and_the_original_is_untouched(kind, tmp_path):
    root = copied("nuclei_tiny", tmp_path)
    change(root, kind)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    changes = repair(examine(root), tmp_path / "corrected").changes
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert {one["finding"] for one in changes} == {kind}
    assert json.loads((tmp_path / "corrected/changes.json").read_text()) == changes
    after = examine(tmp_path / "corrected")
    assert not [one for one in after.findings if KINDS[one.kind].fix]
    assert after.status == 0


def test_frames_of_one_scene_that_differ_by_an_object_all_stay(tmp_path):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(30, 150, size=(12, 16), dtype=np.uint8))
    scene = np.asarray(coarse.resize((320, 240), Image.Resampling.BILINEAR))
    for split in ("train", "valid"):
        places = rng.integers(0, 220, size=(3, 2)).tolist()
        places.append(places[0])  # the last frame shows what the first does
        images = [{"id": k, "file_name": f"{k}.png", "height": 240, "width": 320} for k in range(4)]
        corners = [[x, y, x + 14, y, x + 14, y + 14, x, y + 14] for x, y in places]
        objects = [annotation(k, image_id=k, segmentation=[corners[k]], bbox=None, area=None) for k in range(4)]
        write(tmp_path / "set", content(*objects, images=images), split=split)
        for k, (x, y) in enumerate(places):
            frame = scene + rng.integers(0, 3, size=scene.shape, dtype=np.uint8)
            frame[y : y + 14, x : x + 14] += 30
            Image.fromarray(frame).save(tmp_path / "set" / split / f"{k}.png")
    examination = examine(tmp_path / "set")
    assert len(examination.duplicates[0]) > 5, "alike"
    changes = repair(examination, tmp_path / "fixed").changes
    assert [(one["finding"], one["id"]) for one in changes if "image 0" in one["change"]] == [
        ("duplicate-image", 3)
    ] * 4
    assert [len(images) for images in examine(tmp_path / "fixed").scans.values()] == [3, 3]


def test_a_corrected_copy_never_goes_where_something_is(tmp_path):
    root = write_sample(tmp_path / "set", images=(2, 2, 0))
    with pytest.raises(DataError, match="expected a new or empty folder"):
        repair(examine(root), root)
    with pytest.raises(DataError, match="expected a folder outside the dataset"):
        repair(examine(root), root / "corrected")


@pytest.mark.parametrize("place", ["annotations.json", "annotations/train.json"])
def test_the_copy_of_a_json_file_is_not_written_into_its_dataset(place, tmp_path):
    root = dataset(tmp_path / "set")
    (root / place).parent.mkdir(exist_ok=True)
    (root / "annotations.json").rename(root / place)
    (tmp_path / "elsewhere").mkdir()
    examination = examine(root / place)
    assert examination.status == 0
    for target in (root / "copy", root / "images" / "copy", root / "annotations" / "copy"):
        with pytest.raises(DataError, match="expected a folder outside the dataset"):
            repair(examination, target)
    repair(examination, tmp_path / "copy")
    (root / place).rename(tmp_path / "elsewhere" / "train.json")
    examination = examine(tmp_path / "elsewhere/train.json", None, None, [f"train={root / 'images'}"])
    with pytest.raises(DataError, match="expected a folder outside the dataset"):
        repair(examination, root / "images" / "copy")


def test_the_suggested_copy_lies_beside_the_dataset(tmp_path, capsys, monkeypatch):
    root = dataset(tmp_path / "set", lambda coco: coco["annotations"][0].update(category_id=9))
    monkeypatch.chdir(root)
    for taken in ("", "2"):
        assert main(["check", "."]) == 1
        suggested = re.search(r"m2f (check \. --fix .*)", capsys.readouterr().out)[1]
        assert suggested == f"check . --fix {tmp_path / 'set-corrected'}{taken}"
        assert main(shlex.split(suggested)) == 1
        capsys.readouterr()
        assert (tmp_path / f"set-corrected{taken}/train/_annotations.coco.json").is_file()
    monkeypatch.chdir(tmp_path)
    main(["check", "set"])
    assert "m2f check set --fix corrected\n" in capsys.readouterr().out


def test_no_copy_is_suggested_where_no_object_could_be_kept(tmp_path, capsys):
    root = dataset(tmp_path / "set", lambda coco: [one.update(category_id=9) for one in coco["annotations"]])
    assert main(["check", str(root)]) == 1
    assert "Next" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [None, ["a"]])
def test_objects_of_a_class_without_a_name_stay_under_a_name_made_of_its_id(name, tmp_path):
    root = dataset(tmp_path / "set", lambda coco: coco["categories"][0].update(name=name))
    with pytest.raises(DataError, match="expected a `name`"):
        load_coco(root, cache_dir=tmp_path / "cache")
    repaired = repair(examine(root, SETTINGS), tmp_path / "fixed")
    assert not any(ids for split in repaired.left_out.values() for ids in split.values())
    kept = load_coco(tmp_path / "fixed", cache_dir=tmp_path / "cache")
    assert [one.name for one in categories_of(kept["train"])] == [f"category {base()['categories'][0]['id']}"]


def test_no_copy_is_suggested_where_a_split_would_still_be_missing(tmp_path, capsys):
    write_sample(tmp_path / "set", images=(3, 0, 2))
    assert main(["check", str(tmp_path / "set")]) == 1
    told = capsys.readouterr().out
    assert "expected a split 'valid'" in told
    assert "Next:" not in told


def test_the_copy_is_compared_with_the_original_id_by_id(tmp_path):
    def damage(coco):
        coco["annotations"][0]["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
        coco["annotations"][1]["category_id"] = 9
        coco["annotations"].append({**coco["annotations"][2], "id": 30})

    root = dataset(tmp_path / "set", damage)
    (root / "images/img_5.png").unlink()
    done = repair(examine(root, SETTINGS), tmp_path / "copy")
    assert sorted(key for ids in done.left_out.values() for key in ids["annotations"]) == [1, 2, 6, 30]
    assert sorted(key for ids in done.left_out.values() for key in ids["images"]) == [6]
    assert [sum(counts["objects"][k] for counts in done.counts.values()) for k in (0, 1)] == [7, 3]
    assert [sum(counts["images"][k] for counts in done.counts.values()) for k in (0, 1)] == [6, 5]
    assert "left out: annotations" in done.to_text()
    assert "left out: images 6\n" in done.to_text()
    assert {(one["finding"], one["id"]) for one in done.changes} >= {
        ("bad-mask", 1),
        ("unknown-category", 2),
        ("duplicate-object", 30),
        ("missing-image", 6),
    }
    assert len(objects(tmp_path / "copy", tmp_path / "cache")) == 3


UNMENDABLE = {
    "outlines of larger images": lambda coco: [
        one.update(segmentation=[[40, 30, 90, 30, 90, 80, 40, 80]]) for one in coco["annotations"]
    ],
    "two names for one id": lambda coco: coco["categories"].append({"id": 1, "name": "wall"}),
    "no object is left": lambda coco: [one.update(segmentation=[]) for one in coco["annotations"]],
    "too few images are left": lambda coco: [one.update(file_name=f"{k}.png") for k, one in enumerate(coco["images"])],
}


@pytest.mark.parametrize("case", UNMENDABLE)
def test_nothing_is_written_while_an_error_remains(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = dataset(tmp_path / "set", UNMENDABLE[case])
    if case == "too few images are left":
        (root / "images/img_0.png").rename(root / "images/0.png")
    with pytest.raises(DataError, match=r"nothing is written: .* error\(s\) that --fix can't correct") as refusal:
        repair(examine(root, SETTINGS), tmp_path / "copy")
    assert ".copy-" not in str(refusal.value), "a folder that is deleted"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["set"]
    assert main(["check", str(root), "--fix", str(tmp_path / "copy")]) != 0
    assert "m2f train" not in "".join(capsys.readouterr())
    main(["check", str(root)])
    assert "--fix" not in capsys.readouterr().out.partition("Next:")[2]


def test_outlines_of_larger_images_are_an_error_with_the_factor(tmp_path):
    root = dataset(tmp_path / "set", UNMENDABLE["outlines of larger images"])
    with pytest.raises(DataError, match=r"x 40 to 90 and y 30 to 80 in 20x16 pixels\. .*reduced.*to 1/5 of their size"):
        load_coco(root, cache_dir=tmp_path / "cache")
    (error,) = [one for one in examine(root, SETTINGS).findings if one.kind == "outside-image"]
    assert error.ids == [1, 2, 3, 4, 5, 6] or len(error.ids) == 6


def test_objects_of_two_files_with_the_same_pixels_all_stay(tmp_path):
    def listed_twice(coco):
        coco["images"] += [{**one, "id": one["id"] + 10, "file_name": f"b{one['file_name']}"} for one in coco["images"]]
        moved = [[value + 6 if k % 2 == 0 else value for k, value in enumerate(SQUARE)]]
        more = [{**one, "id": one["id"] + 10, "image_id": one["image_id"] + 10} for one in coco["annotations"]]
        coco["annotations"] += [{**one, "segmentation": moved, "bbox": [8, 3, 10, 8]} for one in more]

    root = dataset(tmp_path / "set", listed_twice)
    for image in base()["images"]:
        (root / "images" / f"b{image['file_name']}").write_bytes((root / "images" / image["file_name"]).read_bytes())
    masks = sorted(str(mask) for _, _, mask in objects(root, tmp_path / "cache"))
    repair(examine(root, SETTINGS), tmp_path / "copy")
    assert sorted(str(mask) for _, _, mask in objects(tmp_path / "copy", tmp_path / "cache")) == masks


def test_small_neighbours_in_two_files_with_the_same_pixels_all_stay(tmp_path):
    """Objects of 10 pixels that lie 15 pixels apart, which is less than 2 % of the image."""
    root = tmp_path / "set"
    for split, shifts in {"train": (0, 15, 1), "valid": (0,)}.items():
        places = [(k, x + shift, 10 * k + x // 40) for k, shift in enumerate(shifts) for x in range(100, 500, 40)]
        squares = [(k, number, [[x, 9, x + 10, 9, x + 10, 19, x, 19]]) for k, x, number in places]
        objects = [annotation(number, image_id=k, segmentation=one, bbox=None) for k, number, one in squares]
        images = [{"id": k, "file_name": f"{k}.png", "height": 1000, "width": 1000} for k in range(len(shifts))]
        write(root, content(*objects, images=images), split=split)
        picture(root / split / "0.png", (1000, 1000))
    picture(root / "valid/other.png", (1000, 1000))
    (root / "valid/other.png").replace(root / "valid/0.png")
    for copied_to in (1, 2):
        Image.open(root / "train/0.png").save(root / f"train/{copied_to}.png", compress_level=1)
    done = repair(examine(root, SETTINGS), tmp_path / "copy")
    assert done.counts["train"]["images"] == (3, 1)
    assert done.counts["train"]["objects"] == (30, 20), "all of image 1; those of image 2 are the same as in image 0"


@pytest.mark.parametrize(("more", "kept"), [(False, {1: 1}), (True, {1: 1, 3: 3})], ids=["same objects", "others"])
def test_copies_of_a_re_encoded_image_are_removed_with_it_or_merged(more, kept, tmp_path):
    """Image 1 is a PNG, 2 the same as a JPEG, 3 and 4 are copies of 2, perhaps with objects that image 1 lacks."""
    root, places = tmp_path / "set", {1: [9], 2: [9], 3: [9, 40] if more else [9], 4: [70] if more else [9]}
    squares = [(k, [[x, 9, x + 20, 9, x + 20, 29, x, 29]]) for k, found in places.items() for x in found]
    objects = [annotation(n, image_id=k, segmentation=one, bbox=None) for n, (k, one) in enumerate(squares)]
    names = {1: "a.png", 2: "b.jpg", 3: "c.jpg", 4: "d.jpg"}
    images = [{"id": k, "file_name": name, "height": 96, "width": 128} for k, name in names.items()]
    write(root, content(*objects, images=images))
    write(root, content(annotation(image_id=9), images=[{**images[0], "id": 9}]), "valid", (128, 96))
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC)
    photo.save(root / "train/a.png")
    for name in ("b.jpg", "c.jpg", "d.jpg"):
        photo.save(root / "train" / name, quality=92)
    repair(examine(root, SETTINGS), tmp_path / "copy")
    scans = examine(tmp_path / "copy", SETTINGS).scans["train"]
    assert {scan.entry["id"]: len(scan.objects) for scan in scans} == kept


def test_masks_that_a_hub_dataset_stores_as_pycocotools_encodes_them_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    bitmap = np.zeros((16, 20), dtype=np.uint8, order="F")
    bitmap[3:11, 2:12] = 1
    mask = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("binary")}
    objects = datasets.List({"category": datasets.ClassLabel(names=["cell"]), "segmentation": mask})
    noise = np.random.default_rng(0).integers(0, 255, (6, 16, 20, 3), dtype=np.uint8)
    one = {"category": 0, "segmentation": coco_mask.encode(bitmap)}
    rows = datasets.Dataset.from_list(
        [{"image": Image.fromarray(image), "objects": [one]} for image in noise],
        features=datasets.Features({"image": datasets.Image(), "objects": objects}),
    )
    repair(examine(as_pushed(datasets.DatasetDict({"train": rows}), tmp_path / "set"), SETTINGS), tmp_path / "copy")
    files = [json.loads(file.read_text()) for file in (tmp_path / "copy").glob("*/_annotations.coco.json")]
    copied = [found["segmentation"] for coco in files for found in coco["annotations"]]
    assert copied == [{"size": [16, 20], "counts": one["segmentation"]["counts"].decode()}] * 6


@pytest.mark.parametrize("remove", [False, True])
def test_images_of_two_splits_are_only_removed_when_asked_for(remove, tmp_path):
    root = tmp_path / "set"
    for split in ("train", "valid"):
        coco = base()
        own = [
            *coco["images"][:3],
            *({**one, "file_name": f"{split}{k}.png"} for k, one in enumerate(coco["images"][3:])),
        ]
        for image in own:
            picture(root / split / image["file_name"])
        (root / split / "_annotations.coco.json").write_text(json.dumps({**coco, "images": own}))
    done = repair(examine(root, SETTINGS), tmp_path / "copy", remove_leaked=remove)
    assert {split: counts["objects"] for split, counts in done.counts.items()} == {
        "train": (6, 3 if remove else 6),
        "valid": (6, 6),
    }
    ids = [1, 2, 3] if remove else []
    assert done.left_out["train"] == {"images": ids, "annotations": ids}


def test_a_split_without_usable_images_is_named_as_dropped(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "valid", "test"):
        coco = base()
        for image in coco["images"]:
            image["file_name"] = f"{split}_{image['file_name']}"
            if split != "test":
                picture(root / split / image["file_name"])
        (root / split).mkdir(exist_ok=True)
        (root / split / "_annotations.coco.json").write_text(json.dumps(coco))
    done = repair(examine(root, SETTINGS), tmp_path / "copy")
    assert list(done.dropped) == ["test"]
    assert "test: 0 of 6 images, 0 of 6 objects, 0 of 1 classes; the split is dropped" in done.to_text()
    assert not (tmp_path / "copy/test").exists()


@pytest.mark.parametrize("content", [{"images": [], "annotations": []}, {}], ids=["empty", "boxes"])
def test_a_test_split_without_images_or_masks_is_named_as_dropped(content, tmp_path, capsys):
    root = write_sample(tmp_path / "set", images=(4, 2, 2))
    path = root / "test/_annotations.coco.json"
    coco = json.loads(path.read_text())
    boxes = [{**one, "segmentation": []} for one in coco["annotations"]]
    path.write_text(json.dumps({**coco, "annotations": boxes, **content}))
    assert main(["check", str(root), "--fix", str(tmp_path / "copy")]) == 0
    assert "  test: no images or masks; the split is dropped" in capsys.readouterr().out
    assert not (tmp_path / "copy/test").exists()
    changes = json.loads((tmp_path / "copy/changes.json").read_text())
    (change,) = [one for one in changes if one["file"] == str(path)]
    assert (change["finding"], change["id"]) == ("test-left-out", "test")
    assert change["change"] == "the split is left out: it has no images or masks"


def test_validation_images_that_can_not_be_used_are_dropped_and_others_held_out(tmp_path, capsys):
    root = write_sample(tmp_path / "set", images=(10, 2, 0))
    for path in (root / "valid").glob("*.jpg"):
        path.unlink()
    assert main(["check", str(root)]) == 1
    assert "--fix" in capsys.readouterr().out.split("Next:")[1]
    done = repair(examine(root), tmp_path / "copy")
    assert list(done.dropped) == ["valid"]
    assert set(load_dataset(tmp_path / "copy")) == {"train", "valid"}
