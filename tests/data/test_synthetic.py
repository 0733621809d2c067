"""The synthetic dataset has every kind of annotation that real ones have, and depends on the seed only."""

import json
from pathlib import Path

import numpy as np

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.masks import segmentation as masks


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    first, again = (write_sample(tmp_path / name, images=(3, 2, 1)) for name in ("a", "b"))
    assert contents(first) == contents(again)
    assert len(contents(first)) == 3 + 6
    assert contents(write_sample(tmp_path / "c", seed=1, images=(3, 2, 1))) != contents(first)


def test_it_holds_every_kind_of_annotation(tmp_path):
    root = write_sample(tmp_path / "set", images=(60, 10, 0))
    coco = json.loads((root / "train/_annotations.coco.json").read_text())
    forms = [entry["segmentation"] for entry in coco["annotations"]]
    assert any(isinstance(form, list) and len(form) == 2 for form in forms)
    assert {type(form["counts"]) for form in forms if isinstance(form, dict)} == {str, list}
    assert any(entry["iscrowd"] for entry in coco["annotations"])
    assert {image["id"] for image in coco["images"]} - {entry["image_id"] for entry in coco["annotations"]}
    assert len({(image["height"], image["width"]) for image in coco["images"]}) > 3
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert [category.name for category in categories_of(splits["train"])] == ["circle", "square", "triangle"]
    check_dataset(splits)
    overlaps = 0
    for row in splits["train"]:
        whole = [masks.decode(e["counts"], row["height"], row["width"]) for e in row["objects"] if not e["iscrowd"]]
        assert all(20**2 / 4 < mask.sum() < 60**2 for mask in whole)
        overlaps += bool(whole) and bool((np.sum(whole, axis=0) > 1).any())
    assert overlaps >= 5
