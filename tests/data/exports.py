"""Tiny imitations of the exports of annotation tools: one function for each tool, which returns the dataset's folder.

Each has at least five images of 20 x 16 pixels with one object each.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]
COUNTS = [35, *([8, 8] * 9), 8, 133]  # of the same square, column by column
EXPORTS: dict[str, Callable[[Path], Path]] = {}
"""Tool -> function that writes its export; the object of every image is the square."""


def export(function: Callable[[Path], Path]) -> Callable[[Path], Path]:
    EXPORTS[function.__name__.replace("_", " ")] = function
    return function


def pictures(folder: Path, names: Sequence[str]) -> None:
    """Write images that are not duplicates of each other."""
    for name in names:
        noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 255, size=(4, 5, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((20, 16), Image.Resampling.NEAREST).save(folder / name)


def dump(path: Path, content: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, **options), encoding="utf-8")


@export
def roboflow(root: Path) -> Path:
    """COCO segmentation: a super-category as id 0, image ids from 0, and the box's area as area."""
    for split, count in (("train", 5), ("valid", 2), ("test", 1)):
        names = [f"{split}_{k}_jpg.rf.0f{k}e5d1c9a7b3e2d4f6a8c0e1b3d5f7a.jpg" for k in range(count)]
        pictures(root / split, names)
        info = {"year": "2024", "version": "1", "description": "Exported from roboflow.com", "contributor": ""}
        images = [
            {"id": k, "license": 1, "file_name": name, "height": 16, "width": 20, "extra": {"name": f"{split}_{k}.jpg"}}
            for k, name in enumerate(names)
        ]
        content = {
            "info": {**info, "url": "https://public.roboflow.com/object-detection/undefined", "date_created": "2024"},
            "licenses": [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}],
            "categories": [
                {"id": 0, "name": "cells", "supercategory": "none"},
                {"id": 1, "name": "cell", "supercategory": "cells"},
            ],
            "images": [{**one, "date_captured": "2024-06-25T13:08:10+00:00"} for one in images],
            "annotations": [
                {"id": k, "image_id": k, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80, "segmentation": [SQUARE]}
                | {"iscrowd": 0}
                for k in range(count)
            ],
        }
        dump(root / split / "_annotations.coco.json", content)
    (root / "README.dataset.txt").write_text("cells > 2024-06-25\nhttps://universe.roboflow.com/a/cells\n")
    (root / "README.roboflow.txt").write_text("cells - v1\n")
    return root


def _cvat(root: Path, *, brush: bool) -> Path:
    names = [f"shelf/frame_{k:06}.PNG" for k in range(5)]
    pictures(root / "images/default", names)
    mask = {"counts": COUNTS, "size": [16, 20]}
    extra = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
    info = {"contributor": "", "date_created": "", "description": "", "url": "", "version": "", "year": ""}
    annotations = [
        {"id": k, "image_id": k, "category_id": 1, "segmentation": mask if brush else [SQUARE], "area": 80.0}
        | {"bbox": [2.0, 3.0, 10.0, 8.0], "iscrowd": int(brush), "attributes": {"occluded": False}}
        for k in range(1, 6)
    ]
    content = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": info,
        "categories": [{"id": 1, "name": "cell", "supercategory": ""}],
        "images": [
            {"id": k + 1, "width": 20, "height": 16, "file_name": name, **extra} for k, name in enumerate(names)
        ],
        "annotations": annotations,
    }
    dump(root / "annotations/instances_default.json", content, separators=(",", ":"))
    return root


@export
def cvat(root: Path) -> Path:
    """COCO 1.0 of a task: one subset named default, folders in file names, ids from 1."""
    return _cvat(root, brush=False)


@export
def cvat_brush(root: Path) -> Path:
    """The same, drawn with the brush: run lengths as a list, and every object a crowd region."""
    return _cvat(root, brush=True)


def _label_studio(root: Path, written: Callable[[str], str], images: str = "images") -> Path:
    names = [f"{k:08x}-photo_{k}.png" for k in range(6)]
    pictures(root / images, names)
    content = {
        "images": [{"width": 20, "height": 16, "id": k, "file_name": written(name)} for k, name in enumerate(names)],
        "categories": [{"id": 0, "name": "cell"}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 0, "segmentation": [SQUARE], "bbox": [2.0, 3.0, 10.0, 8.0]}
            | {"ignore": 0, "iscrowd": 0, "area": 80.0}
            for k in range(6)
        ],
        "info": {"year": 2026, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""}
        | {"date_created": "2026-11-22 12:00:00.000000"},
    }
    dump(root / "result.json", content, indent=2)
    return root


@export
def label_studio(root: Path) -> Path:
    """COCO with images, on Linux: ids and categories from 0, no super-category."""
    return _label_studio(root, lambda name: f"images/{name}")


@export
def label_studio_on_windows(root: Path) -> Path:
    return _label_studio(root, lambda name: f"images\\{name}")


@export
def label_studio_with_project_number(root: Path) -> Path:
    return _label_studio(root, lambda name: f"images\\1/{name}")


@export
def label_studio_1_16_on_windows(root: Path) -> Path:
    return _label_studio(root, lambda name: f"..\\..\\label-studio\\label-studio\\media\\upload\\4\\{name}")


@export
def label_studio_with_its_own_storage(root: Path) -> Path:
    return _label_studio(root, lambda name: f"/label-studio/data/media/upload/1/{name}")


def _vgg_content(names: Sequence[str]) -> dict[str, Any]:
    address = "http://www.robots.ox.ac.uk/~vgg/software/via/"
    about = f"VIA project exported to COCO format using VGG Image Annotator ({address})"
    info = {"year": 2026, "version": "1.0", "description": about, "contributor": "", "url": address}
    return {
        "info": {**info, "date_created": "Sun Nov 22 2026 12:00:00 GMT+0000"},
        "images": [
            {"id": k, "width": 20, "height": 16, "file_name": name, "license": 0, "flickr_url": name}
            | {"coco_url": name, "date_captured": ""}
            for k, name in enumerate(names, start=1)
        ],
        "annotations": [
            {"segmentation": [[int(value) for value in SQUARE]], "area": 80, "bbox": [2, 3, 10, 8], "iscrowd": 0}
            | {"id": k, "image_id": k, "category_id": 1}
            for k in range(1, len(names) + 1)
        ],
        "licenses": [{"id": 0, "name": "Unknown License", "url": ""}],
        "categories": [{"supercategory": "type", "id": 1, "name": "cell"}],
    }


@export
def vgg(root: Path) -> Path:
    """The annotator's COCO export, whatever its name, beside the images."""
    names = [f"adutta_{k}.png" for k in range(5)]
    pictures(root, names)
    dump(root / "via_project_22Nov2026_12h0m_coco.json", _vgg_content(names))
    return root


@export
def one_file_and_a_folder_of_any_name(root: Path) -> Path:
    names = [f"IMG_{k}.png" for k in range(10)]
    pictures(root / "JPEGImages", names)
    dump(root / "my labels.json", _vgg_content(names))
    return root


@export
def train_and_val_files_in_the_folder(root: Path) -> Path:
    """Home-made: one image folder for both."""
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        names = [f"{k}.png" for k in numbers]
        pictures(root / "images", names)
        dump(root / f"coco_{split}.json", _vgg_content(names))
    return root


def coco(names: Sequence[str], **image: Any) -> dict[str, Any]:
    """COCO with the square as the object of each image."""
    return {
        "info": {"description": "", "year": "", "version": ""},
        "licenses": [],
        "categories": [{"id": 1, "name": "cell", "supercategory": None}],
        "images": [{"id": k, "file_name": name, "height": 16, "width": 20, **image} for k, name in enumerate(names, 1)],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [2.0, 3.0, 10.0, 8.0], "area": 80.0}
            | {"segmentation": [SQUARE], "iscrowd": 0}
            for k in range(1, len(names) + 1)
        ],
    }


@export
def fiftyone(root: Path) -> Path:
    """COCODetectionDataset, exported split by split: each folder has data/ and labels.json."""
    for split, numbers in (("train", range(5)), ("validation", range(5, 7))):
        names = [f"{k:06}.png" for k in numbers]
        pictures(root / split / "data", names)
        dump(root / split / "labels.json", coco(names))
    return root


@export
def fiftyone_with_labels_apart(root: Path) -> Path:
    """The same with data_path and labels_path, as its zoo stores COCO."""
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        names = [f"{k:06}.png" for k in numbers]
        pictures(root / "data" / split, names)
        dump(root / "labels" / f"{split}.json", coco(names))
    return root


@export
def supervisely(root: Path) -> Path:
    """Export to COCO: a project with one folder for each dataset."""
    names = [f"IMG_{k}.png" for k in range(6)]
    pictures(root / "123_cells/ds0/images", names)
    dump(root / "123_cells/ds0/annotations/instances.json", coco(names))
    return root


@export
def datumaro(root: Path) -> Path:
    """coco_instances with --save-media: images/<subset> and annotations/instances_<subset>.json."""
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        names = [f"{k}.png" for k in numbers]
        pictures(root / "images" / split, names)
        dump(root / f"annotations/instances_{split}.json", coco(names, license=0, flickr_url="", coco_url=""))
    return root


@export
def labelme(root: Path) -> Path:
    """One JSON file beside each image."""
    names = [f"photo {k}" for k in range(6)]
    pictures(root, [f"{name}.png" for name in names])
    points = [SQUARE[k : k + 2] for k in range(0, 8, 2)]
    shape = {"label": "cell", "points": points, "group_id": None, "description": "", "shape_type": "polygon"}
    for name in names:
        content = {"version": "5.5.0", "flags": {}, "shapes": [{**shape, "flags": {}, "mask": None}]}
        dump(root / f"{name}.json", {**content, "imagePath": f"{name}.png", "imageData": "iVBORw0KGgo="}
             | {"imageHeight": 16, "imageWidth": 20}, indent=2)  # fmt: skip
    return root


@export
def hugging_face_imagefolder(root: Path) -> Path:
    """A metadata.jsonl beside the images of each split."""
    objects = {"bbox": [[2, 3, 10, 8]], "categories": ["cell"], "segmentation": [[SQUARE]], "area": [80]}
    for split, numbers in (("train", range(5)), ("validation", range(5, 7))):
        names = [f"{k:04}.png" for k in numbers]
        pictures(root / split, names)
        lines = (json.dumps({"file_name": name, "objects": objects}) for name in names)
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    return root


@export
def ultralytics(root: Path) -> Path:
    """A data.yaml, and a text file for each image."""
    line = " ".join(f"{value / (16 if k % 2 else 20):.6f}" for k, value in enumerate(SQUARE))
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        names = [f"{k}.png" for k in numbers]
        pictures(root / "images" / split, names)
        for name in names:
            path = (root / "labels" / split / name).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"0 {line}\n")
    (root / "data.yaml").write_text(
        "path: ../datasets/cells\ntrain: images/train\nval: images/val\nnames:\n  0: cell\n"
    )
    return root


def vgg_own(root: Path) -> Path:
    """The annotator's own project file, which is not COCO."""
    pictures(root, ["a.png"])
    shape = {"name": "polygon", "all_points_x": [2, 12, 12], "all_points_y": [3, 3, 11]}
    region = {"shape_attributes": shape, "region_attributes": {"type": "cell"}}
    entry = {"filename": "a.png", "size": 311, "regions": [region], "file_attributes": {}}
    dump(root / "via_region_data.json", {"a.png311": entry})
    return root
