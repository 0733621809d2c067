"""labelme folders are read without conversion: shapes become the objects that labelme's own converter makes of them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.formats import find_splits
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.exports import dump, pictures

POLYGON = [[2, 3], [12, 3], [12, 11], [2, 11]]


def shape(label="cell", points=POLYGON, kind="polygon", **more):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def labelme(root, names, *shapes, image_path="{}.png", folder=""):
    """Images of 20 x 16 pixels, each with a file of these shapes."""
    pictures(root, [f"{name}.png" for name in names])
    for name in names:
        content = {"version": "5.5.0", "flags": {}, "shapes": list(shapes or [shape()]), "imageData": None}
        content |= {"imagePath": image_path.format(name), "imageHeight": 16, "imageWidth": 20}
        dump(root / folder / f"{name}.json", content, indent=2)
    return root


def objects_of(root, tmp_path):
    (row,) = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    return [masks.decode(one["counts"], 16, 20) for one in row["objects"]]


def test_each_file_is_an_image_and_classes_are_numbered_over_all_splits(tmp_path):
    labelme(tmp_path / "set/train", "ab", shape("cell"), shape("spot"))
    labelme(tmp_path / "set/val", "c", shape("spot"))
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "valid": 1}
    assert [(one.id, one.name) for one in categories_of(splits["train"])] == [(1, "cell"), (2, "spot")]
    assert [one["category_id"] for one in splits["valid"][0]["objects"]] == [2]
    assert splits["train"][0]["objects"][0]["area"] == 80
    assert examine(tmp_path / "set").status == 0


def test_rectangles_circles_and_masks_are_areas(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).save(buffer, "PNG")
    mask = base64.b64encode(buffer.getvalue()).decode()
    shapes = [
        shape(points=[[2, 3], [12, 11]], kind="rectangle"),
        shape(points=[[10, 8], [14, 8]], kind="circle"),
        shape(points=[[5, 6], [6, 7]], kind="mask", mask=mask),
    ]
    square, disc, drawn = objects_of(labelme(tmp_path / "set", "a", *shapes), tmp_path)
    assert square.sum() == 80
    assert square[3:11, 2:12].all()
    y, x = np.mgrid[:16, :20] + 0.5
    true = (x - 10) ** 2 + (y - 8) ** 2 <= 16
    assert (disc != true).sum() <= 4
    assert drawn.sum() == 3
    assert not drawn[6, 5]
    assert drawn[6, 6]


@pytest.mark.parametrize("kind", ["rectangle", "rotation", "oriented_rectangle", "quadrilateral"])
def test_rectangles_of_four_corners_are_polygons(kind, tmp_path):
    """As X-AnyLabeling and newer versions of labelme write them."""
    turned = [[10, 2], [14, 6], [10, 10], [6, 6]]
    square, diamond = objects_of(
        labelme(tmp_path / "set", "a", shape(kind=kind), shape(points=turned, kind=kind)), tmp_path
    )
    assert square.sum() == 80
    assert square[3:11, 2:12].all()
    assert np.array_equal(diamond, masks.decode(masks.to_counts([[10, 2, 14, 6, 10, 10, 6, 6]], 16, 20, ""), 16, 20))


@pytest.mark.parametrize("bad", [shape(points=[[1, 2]], kind="rectangle"), shape(kind="ellipse")])
def test_a_faulty_shape_is_counted_once_and_leaves_no_object(bad, tmp_path):
    root = labelme(tmp_path / "set", "abcdef", shape())
    labelme(root, "c", shape(), bad)
    examination = examine(root)
    (error,) = [one for one in examination.findings if one.severity == "error"]
    assert (error.kind, error.ids) == ("bad-mask", ["c.json:1"])
    assert sum(len(scan.objects) for scans in examination.scans.values() for scan in scans) == 6
    assert repair(examination, tmp_path / "copy").to_text().count("c.json:1") == 1


def test_a_faulty_part_of_an_object_with_a_mask_is_reported_as_that_object(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 255, np.uint8)).save(buffer, "PNG")
    mask = shape(points=[[5, 6], [6, 7]], kind="mask", mask=base64.b64encode(buffer.getvalue()).decode(), group_id=1)
    root = labelme(tmp_path / "set", "abcdef", shape())
    labelme(root, "c", shape(), mask, shape(points=[[3, 3], [4, 4]], group_id=1))
    examination = examine(root)
    (error,) = [one for one in examination.findings if one.severity == "error"]
    assert (error.kind, error.ids) == ("bad-mask", ["c.json:1"])
    assert "c.json, shape 2, polygon 0: expected at least three points" in error.message
    assert sum(len(scan.objects) for scans in examination.scans.values() for scan in scans) == 6


def test_the_objects_of_an_unreadable_image_are_counted(tmp_path):
    parts = [shape(points=[[x, 1], [x + 3, 1], [x + 3, 4]], group_id=7) for x in (1, 10)]
    root = labelme(tmp_path / "set", "abcdef", shape(), *parts)
    content = json.loads((root / "b.json").read_text())
    (root / "b.json").write_text(json.dumps({**content, "imageHeight": None}))
    (root / "b.png").write_bytes(b"no image")
    text = repair(examine(root), tmp_path / "copy").to_text()
    found = [re.search(rf"(\d+) of (\d+) {what}", line) for what in ("images", "objects") for line in text.splitlines()]
    kept, total = zip(*(map(int, one.groups()) for one in found if one), strict=True)
    assert (sum(kept[:2]), sum(total[:2]), sum(kept[2:]), sum(total[2:])) == (5, 6, 10, 12)


def test_an_image_beside_its_file_is_read_where_its_path_leads_elsewhere(tmp_path):
    for folder in ("first", "second"):
        labelme(tmp_path / "set" / folder, "a", image_path=str(tmp_path / "elsewhere/{}.png"))
    pictures(tmp_path / "elsewhere", ["a.png"])
    rows = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")["train"]
    places = [f"{tmp_path.resolve()}/set/{folder}/a.png" for folder in ("first", "second")]
    assert [row["image"]["path"] for row in rows] == places
    assert [one.ids for one in examine(tmp_path / "set").findings if one.kind == "found-image"] == [["a.json"] * 2]


def test_an_image_beside_its_file_and_one_in_the_folder_of_its_path_are_ambiguous(tmp_path):
    root = labelme(tmp_path / "set", "a", image_path="..\\old\\images\\{}.png")
    (root / "images").mkdir()
    Image.fromarray(np.full_like(np.asarray(Image.open(root / "a.png")), 7)).save(root / "images/a.png")
    with pytest.raises(DataError, match=r"may be .*set/a\.png, .*set/images/a\.png\. Correct `imagePath`"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_images_beside_the_named_folder_are_refused_with_the_folder_that_holds_both(tmp_path):
    root = labelme(tmp_path / "set/images", "ab", image_path="..\\images\\{}.png", folder="../labels").parent
    message = (
        rf"labels/a\.json: its `imagePath` .*images.*a\.png' leads out of .*labels\. Name {root}, which holds both"
    )
    with pytest.raises(DataError, match=message):
        load_coco(root / "labels", cache_dir=tmp_path / "cache")
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"]) == 2


def put_inside(path, data=None):
    """Move the image beside an annotation file into it; return the bytes of the image."""
    image = path.with_suffix(".png").read_bytes()
    path.with_suffix(".png").unlink()
    text = base64.b64encode(image).decode() if data is None else data
    path.write_text(json.dumps({**json.loads(path.read_text()), "imageData": text}))
    return image


def test_images_that_only_the_annotation_files_hold_are_read_from_these_and_counted(tmp_path, caplog):
    root = labelme(tmp_path / "set", "abcde", image_path="..\\photos\\{}.png")
    held = [put_inside(root / f"{name}.json") for name in "abd"]
    (root / "b.json").write_text((root / "b.json").read_text().replace('"imageHeight": 16', '"imageHeight": null'))
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert "image read from its annotation file (3), the first: " in caplog.text
    rows = sorted((row for rows in splits.values() for row in rows), key=lambda row: row["image_id"])
    assert [row["image"]["bytes"] for row in rows] == [held[0], held[1], None, held[2], None]
    assert {(row["height"], row["width"], row["objects"][0]["area"]) for row in rows} == {(16, 20, 80)}
    found = examine(root)
    assert found.status == 0
    assert [one.ids for one in found.findings if one.kind == "image-inside"] == [["a.json", "b.json", "d.json"]]
    repair(found, tmp_path / "copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").rglob("*.png")}
    assert [copied[f"{name}.png"] for name in "abd"] == held
    assert examine(tmp_path / "copy").status == 0


def test_an_image_file_is_read_instead_of_the_image_inside_an_annotation_file(tmp_path):
    root = labelme(tmp_path / "set", "a", image_path="..\\photos\\{}.png")
    image = put_inside(root / "a.json")
    (root / "a.png").write_bytes(image)
    (row,) = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert row["image"] == {"path": str(root.resolve() / "a.png"), "bytes": None}


def test_an_image_inside_an_annotation_file_decides_between_files_of_its_name(tmp_path):
    root = labelme(tmp_path / "set", "a", image_path="..\\photos\\{}.png")
    pictures(root, ["first/a.png", "second/a.png"])
    image = put_inside(root / "a.json")
    (row,) = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert row["image"]["bytes"] == image


@pytest.mark.parametrize("data", ["x", 3, {"a": 1}])
def test_an_image_inside_an_annotation_file_that_is_no_base64_is_refused(data, tmp_path):
    root = labelme(tmp_path / "set", "a")
    put_inside(root / "a.json", data)
    with pytest.raises(DataError, match=r"a\.json: expected the image in base64 as `imageData` \(.*Add the image file"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert not [one for one in examine(root).findings if one.kind == "image-inside"]


def test_shapes_of_one_label_and_group_are_one_object(tmp_path):
    parts = [shape(points=[[x, 1], [x + 3, 1], [x + 3, 4], [x, 4]], group_id=7) for x in (1, 10)]
    alone, joined, other = objects_of(
        labelme(tmp_path / "set", "a", shape(), *parts, shape("spot", group_id=7)), tmp_path
    )
    assert (alone.sum(), joined.sum(), other.sum()) == (80, 18, 80)


@pytest.mark.parametrize("written", ["../images/{}.png", "..\\images\\{}.png", "D:\\photos\\{}.png", "{}.png"])
def test_images_are_found_in_another_folder_or_by_their_name(written, tmp_path):
    root = labelme(tmp_path / "set/images", "ab", image_path=written, folder="../labels").parent
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [row["image"]["path"] for row in rows] == [str((root / f"images/{name}.png").resolve()) for name in "ab"]


def test_an_image_is_found_by_its_name_in_its_own_split_only(tmp_path):
    labelme(tmp_path / "set/train", "ab")
    labelme(tmp_path / "set/val", "bc")
    (tmp_path / "set/train/b.png").rename(tmp_path / "set/train/other.png")
    with pytest.raises(DataError, match=r"train/b\.json: 'b\.png' is missing; .*val/b\.png is in a folder of another"):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    for folder in ("first", "second"):
        pictures(tmp_path / "set/train" / folder, ["b.png"])
    Image.new("RGB", (20, 16)).save(tmp_path / "set/train/second/b.png")
    with pytest.raises(DataError, match=r"'b\.png' may be .*first/b\.png, .*second/b\.png"):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    (tmp_path / "set/train/second/b.png").unlink()
    rows = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")["train"]
    assert [row["image"]["path"].split("train/")[1] for row in rows] == ["a.png", "first/b.png"]
    notes = {one.kind: one.ids for one in examine(tmp_path / "set").findings if one.severity == "note"}
    assert notes == {"found-image": ["b.json"]}


@pytest.mark.parametrize("sides", [{}, {"imageHeight": None}])
@pytest.mark.parametrize("written", ["../../secret.png", "/etc/hostname", "../link.png"])
def test_an_image_outside_the_folder_is_refused(written, sides, tmp_path):
    root = labelme(tmp_path / "set/a", "a", image_path=written).parent
    (root / "a/a.json").write_text(json.dumps({**json.loads((root / "a/a.json").read_text()), **sides}))
    Image.new("RGB", (20, 16)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"(its `imagePath`|`file_name`) '.*' leads out of"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_points_and_lines_are_reported_and_left_out(tmp_path):
    root = labelme(tmp_path / "set", "abcdef", shape(), shape(points=[[1, 2]], kind="point"))
    examination = examine(root)
    (finding,) = [one for one in examination.findings if one.kind == "no-area"]
    assert finding.ids[0] == "a.json:1"
    assert [len(scan.objects) for scan in examination.scans["train"]] == [1] * 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (shape(points=[[1, 2], [3, 4]]), "at least three points|polygon 0"),
        (shape(points=[[1, 2], [3]]), "expected a `label` and `points` as pairs"),
        (shape(label=None), "expected a `label`"),
        (shape(kind="ellipse"), "expected a polygon, rectangle, circle or mask"),
        (shape(points=[[5, 6], [6, 7]], kind="mask", mask="AAAA"), "expected the mask as a PNG in base64"),
        (shape(points=[[1, 2]], kind="rectangle"), "expected two points of a rectangle, got 1"),
        ("text", "expected a `label`"),
        (shape(points=[[0, 0], [1e300, 0]], kind="circle"), "as pairs of numbers"),
        (shape(points=[[0, 0], [float("nan"), 0]], kind="mask"), "as pairs of numbers"),
        (shape(points=[[0, 0], [10**400, 0], [3, 3]]), "as pairs of numbers"),
    ],
)
def test_a_faulty_shape_is_refused_with_its_file(bad, message, tmp_path):
    root = labelme(tmp_path / "set", "a", shape(), bad)
    with pytest.raises(DataError, match=message) as error:
        load_coco(root, cache_dir=tmp_path / "cache")
    assert str(root) in str(error.value)


def test_files_in_no_folder_of_a_split_are_refused_beside_others(tmp_path):
    labelme(tmp_path / "set/train", "a")
    labelme(tmp_path / "set/batch2", "b")
    with pytest.raises(DataError, match=r"1 of 2 labelme files are in no folder of a split: .*batch2/b\.json"):
        find_splits(tmp_path / "set")


def by_two_annotators(root):
    """Images a and b with a file of each of two annotators."""
    labelme(root, "ab", shape("cell"), image_path="../{}.png", folder="anna")
    moved = [[x + 8, y] for x, y in POLYGON]
    return labelme(root, "ab", shape("spot", moved), image_path="../{}.png", folder="ben")


def test_files_of_one_image_are_one_image_with_all_their_objects(tmp_path, caplog):
    rows = load_coco(by_two_annotators(tmp_path / "set"), cache_dir=tmp_path / "cache")["train"]
    assert [row["image"]["path"][-5:] for row in rows] == ["a.png", "b.png"]
    for row in rows:
        assert [(one["category_id"], one["bbox"]) for one in row["objects"]] == [
            (1, [2, 3, 10, 8]),
            (2, [10, 3, 10, 8]),
        ]
    assert "image listed more than once (2), the first: " in caplog.text
    assert "ben/a.json: a.png is the same file as image 1, a.png" in caplog.text


def test_files_of_one_image_with_two_sizes_are_refused(tmp_path):
    root = by_two_annotators(tmp_path / "set")
    path = root / "ben/b.json"
    path.write_text(path.read_text().replace('"imageWidth": 20', '"imageWidth": 10'))
    expected = r"ben/b\.json: b\.png is the same file as image 2 but has another size, 10x16 instead of 20x16 pixels"
    with pytest.raises(DataError, match=expected):
        load_coco(root, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("stale", "image"), [("b", "a"), ("a", "b")], ids=["the second", "the first"])
def test_a_file_that_names_the_image_of_another_and_has_its_own_beside_it_is_refused(stale, image, tmp_path):
    """Such as the copy of a file whose `imagePath` was not changed."""
    root = labelme(labelme(tmp_path / "set", "a"), "b")
    path = root / f"{stale}.json"
    path.write_text(path.read_text().replace(f"{stale}.png", f"{image}.png"))
    expected = rf"{image}\.png is also named by another file, and there is .*{stale}\.png, too\. Correct `imagePath`"
    with pytest.raises(DataError, match=expected):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_the_cache_follows_the_files(tmp_path):
    root = labelme(tmp_path / "set", "a")
    assert len(objects_of(root, tmp_path)) == 1
    labelme(root, "a", shape(), shape("spot"))
    assert len(objects_of(root, tmp_path)) == 2
    (root / "a.json").write_text(json.dumps({"shapes": 3, "imagePath": "a.png"}))
    with pytest.raises(DataError, match="expected a labelme file with a list under 'shapes'"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_random_damage_is_refused_or_read_but_never_crashes(tmp_path):
    root = labelme(tmp_path / "set", "a", shape(), shape(points=[[2, 3], [9, 9]], kind="circle"))
    text = (root / "a.json").read_text()
    generator = np.random.default_rng(0)
    for trial in range(60):
        place, length = generator.integers(0, len(text), 2)
        damaged = text[:place] + generator.choice(["", "1e999", "null", "[]", "-7", '"x"']) + text[place + length % 9 :]
        (root / "a.json").write_text(damaged)
        examination = examine(root)
        assert examination.status in (0, 1, 2), (trial, damaged)
