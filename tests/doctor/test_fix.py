"""A corrected copy has none of the problems that can be corrected, and the original stays as it is."""

import json

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.problems import KINDS
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.errors import DataError
from tests.data.folders import annotation, content, needs_real_data, write
from tests.doctor.test_examine import PLANTS, change, copied


@needs_real_data
@pytest.mark.parametrize("kind", [kind for kind in PLANTS if KINDS[kind].fix])
def test_a_corrected_copy_is_clean_of_what_was_planted_and_the_original_is_untouched(kind, tmp_path):
    root = copied("nuclei_tiny", tmp_path)
    change(root, kind)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    changes = repair(examine(root), tmp_path / "corrected")
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
    changes = repair(examination, tmp_path / "fixed")
    assert [(one["finding"], one["id"]) for one in changes] == [("duplicate-image", 3)]
    assert [len(images) for images in examine(tmp_path / "fixed").scans.values()] == [4, 3]


def test_a_corrected_copy_never_goes_where_something_is(tmp_path):
    root = write_sample(tmp_path / "set", images=(2, 2, 0))
    with pytest.raises(DataError, match="expected a new or empty folder"):
        repair(examine(root), root)
    with pytest.raises(DataError, match="expected a folder outside the dataset"):
        repair(examine(root), root / "corrected")
