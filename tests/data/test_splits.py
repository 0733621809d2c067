"""A split builds its rows from files inside its folder only, and from valid masks."""

import pytest

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.doctor.examine import examine
from m2f_trainer.errors import DataError, MaskError
from tests.data.folders import annotation, content, write
from tests.data.test_labelme import labelme, shape
from tests.data.test_yolo import yolo

IMAGE = {"id": 1, "file_name": "a.png", "height": 16, "width": 20}


@pytest.mark.parametrize(
    "name",
    ["../a.png", "x/../../a.png", "/etc/hostname", "..", "a\0.png", "x\\a.png", "link.png", "out/a.png", "C:\\a.png"],
)
def test_file_names_that_leave_the_image_folder_are_refused(name, tmp_path):
    root = write(tmp_path / "set", content(images=[{**IMAGE, "file_name": name}]))
    (root / "a.png").write_bytes(b"secret")
    (root / "train/link.png").symlink_to(root / "a.png")
    (root / "train/out").symlink_to(root)
    with pytest.raises(DataError, match="file_name"):
        load_coco(root, cache_dir=tmp_path / "cache")


FAR = [[40, 32], [80, 32], [80, 64], [40, 64]]  # of an image of 20 x 16 pixels
FLAT = [40, 32, 80, 32, 80, 64, 40, 64]
SPELLINGS = {
    "polygons": [FLAT],
    "flat numbers": FLAT,
    "points": FAR,
    "points as objects": [[{"x": x, "y": y} for x, y in FAR]],
    "text": str([FLAT]),
}


@pytest.mark.parametrize("name", [*SPELLINGS, "YOLO", "labelme"])
def test_outlines_outside_of_their_images_are_an_error_with_the_factor_in_every_format(name, tmp_path):
    if name == "labelme":
        root = labelme(tmp_path / "set", "abcdef", shape(points=FAR))
    elif name == "YOLO":
        root = yolo(tmp_path / "set", "0 1.2 1.2 1.6 1.2 1.6 1.6 1.2 1.6")
    else:
        objects = [annotation(k, segmentation=SPELLINGS[name], bbox=None) for k in range(3)]
        root = write(tmp_path / "set", content(*objects))
    with pytest.raises(DataError, match=r"its outline lies outside the image, x \d+ to .* to 1/(4|1\.6) of"):
        load_coco(root, cache_dir=tmp_path / "cache")
    counts = [one.count for one in examine(root).findings if one.kind == "outside-image"]
    assert counts == {"YOLO": [1, 1], "labelme": [6]}.get(name, [3])


@pytest.mark.parametrize("outline", [[300, 3, 310, 3, 310, 9], [[300, 3], [310, 3], [310, 9]]])
def test_the_message_on_a_far_outline_names_its_coordinate_in_every_spelling(outline, tmp_path):
    root = write(tmp_path / "set", content(annotation(7, segmentation=outline)))
    with pytest.raises(MaskError, match=r"annotation 7 .*within 10 sides of the 20x16 image, got 300"):
        load_coco(root, cache_dir=tmp_path / "cache")
