"""The figures of `m2f check` and its text."""

import json
import re
import shutil

from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.doctor.summary import figures, summary_text
from tests.data.folders import annotation, content, write


def test_the_summary_counts_what_the_set_holds(tmp_path):
    root = write_sample(tmp_path / "set", images=(12, 4, 0))
    summary = figures(examine(root, Settings(128, 128, 20)))
    truth = json.loads((root / "train/_annotations.coco.json").read_text())
    crowds = sum(one["iscrowd"] for one in truth["annotations"])
    assert summary["splits"]["train"] == {
        "images": 12, "empty": 1, "instances": len(truth["annotations"]) - crowds, "crowds": crowds,
    }  # fmt: skip
    assert sum(counts["train"] for counts in summary["classes"].values()) == len(truth["annotations"]) - crowds
    assert summary["instances_per_image"]["max"] <= 5
    assert (summary["num_queries"], summary["input_size"]) == (20, [128, 128])
    assert sum(count for _, count in summary["image_sizes"]) == 16


def test_counts_of_classes_are_in_one_column_whatever_the_length_of_a_name(tmp_path):
    name = "non-building-infrastructure"
    coco = content(annotation(), annotation(2, category_id=6))
    coco["categories"].append({"id": 6, "name": name})
    lines = summary_text(examine(write(tmp_path, coco))).splitlines()
    rows = [line for line in lines if line.startswith(("  cell", f"  {name}"))]
    assert len(rows) == 2
    assert len({row.index("train 1") for row in rows}) == 1
    assert re.search(rf"{name}\s+train 1", "\n".join(rows))


def test_a_long_name_of_a_class_is_cut_in_the_table(tmp_path):
    coco = content()
    coco["categories"][0]["name"] = "x" * 300
    text = summary_text(examine(write(tmp_path, coco)))
    assert re.search(r"^  x{37}\.\.\. +train 1$", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[:10])) < 150


def test_the_rarest_classes_are_named_with_their_images_and_what_helps(tmp_path):
    """150 images have a cell, and the first of them has dust, too: less than 1 % of the images."""
    coco = content(*(annotation(k, image_id=k) for k in range(1, 151)), annotation(900, category_id=6))
    coco["categories"].append({"id": 6, "name": "dust"})
    coco["images"] = [{**coco["images"][0], "id": k, "file_name": f"{k}.png"} for k in range(1, 151)]
    write(tmp_path, content(), "valid")
    write(tmp_path, coco)
    for k in range(1, 151):
        shutil.copy(tmp_path / "train" / "a.png", tmp_path / "train" / f"{k}.png")
    result = examine(tmp_path)
    assert figures(result)["rarest_classes"] == [("dust", 1, 1), ("cell", 150, 150)]
    text = summary_text(result)
    assert "rarest classes, in how many of 150 training images: dust in 1 (1 objects), cell in 150 (150" in text
    assert "1 of 2 classes are in less than 1 % of the training images; to train more on them: m2f train" in text
