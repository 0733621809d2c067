"""Advice on recipe values, for made-up datasets of known objects."""

from pathlib import Path

import pytest

from m2f_trainer.doctor.advice import tile_size
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.scan import Settings
from tests.data.folders import annotation, content, write


def write_squares(folder: Path, count: int, side: int) -> None:
    """Two splits of an image of 512 x 512 with a grid of squares."""
    across = 512 // (side + 8)
    corners = [(4 + (side + 8) * (k % across), 4 + (side + 8) * (k // across)) for k in range(count)]
    squares = [
        annotation(
            number,
            segmentation=[[x, y, x + side, y, x + side, y + side, x, y + side]],
            bbox=[x, y, side, side],
            area=side * side,
        )
        for number, (x, y) in enumerate(corners, 1)
    ]
    image = {"id": 1, "file_name": "a.png", "height": 512, "width": 512}
    for split in ("train", "valid"):
        write(folder, content(*squares, images=[image]), split, (512, 512))


def advice(folder: Path, count: int, side: int, **settings: int) -> int | None:
    """The tile size advised for images of 512 x 512 with so many squares of a side."""
    write_squares(folder, count, side)
    found = tile_size(examine(folder).scans["train"], Settings(**settings))
    return None if found is None else found.value


@pytest.mark.parametrize(
    ("count", "side", "settings", "tile"),
    [
        (150, 20, {}, 80),  # more than the queries
        (50, 20, {}, None),  # 40 pixels at 1024 x 1024
        (50, 20, {"image_height": 512, "image_width": 512}, 80),  # small at the input size
        (50, 20, {"num_queries": 40}, 80),
        (9, 120, {"num_queries": 4}, None),  # a tile would be as large as the image
    ],
)
def test_tiles_are_advised_for_small_or_many_objects(
    tmp_path: Path, count: int, side: int, settings: dict[str, int], tile: int | None
) -> None:
    assert advice(tmp_path, count, side, **settings) == tile


def test_the_check_names_the_tile_size_and_the_reason(tmp_path: Path) -> None:
    write_squares(tmp_path, 150, 20)
    (finding,) = [one for one in examine(tmp_path).findings if one.kind == "small-objects"]
    assert finding.severity == "warning"
    assert finding.message == (
        "1 % of the images have 150 objects or more, and the model has 100 queries: --tile_size 80 --num_queries auto."
    )
