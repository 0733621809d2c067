"""A split builds its rows from files inside its folder only, and from valid masks."""

import pytest

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.errors import DataError
from tests.data.folders import content, write

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
