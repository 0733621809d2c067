"""Untrusted datasets: images elsewhere on the machine, and YAML that expands."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from m2f_trainer.data.hub_dataset import load_dataset
from tests.security.conftest import Command

BOX = {"bbox": [[1.0, 1.0, 20.0, 20.0]], "category": [0]}
POLYGON = [[[1.0, 1.0, 20.0, 1.0, 20.0, 20.0]]]


def parquet(folder: Path, path: str | None, data: bytes | None) -> Path:
    """A downloaded Hub data set whose only image is stored like this."""
    rows = {
        "image": [{"path": path, "bytes": data}] * 2,
        "objects": [{**BOX, "segmentation": [POLYGON[0]]}] * 2,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category": datasets.List(datasets.Value("int64")),
                "segmentation": datasets.List(datasets.List(datasets.List(datasets.Value("float32")))),
            },
        }
    )
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=features).data.table  # to_parquet would embed the images
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("command", ["check", "train", "evaluate"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_row_may_not_name_an_image_elsewhere_on_the_machine(
    command: str,
    relative: bool,
    m2f: Command,
    model: Path,
    photo: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photo.parent)
    folder = parquet(tmp_path / "data", photo.name if relative else str(photo), None)
    arguments = {
        "check": [folder],
        "train": [recipe(dataset_name=str(folder))],
        "evaluate": [model, folder],
    }[command]
    ran = m2f(command, *arguments)
    assert ran.status in (1, 2)
    assert f"row 0: expected the bytes of an image, or a path inside {folder}, got" in ran.err + ran.out


def test_a_row_may_hold_bytes_whatever_name_they_have(photo: Path, tmp_path: Path) -> None:
    folder = parquet(tmp_path / "data", "/nowhere/passwd", photo.read_bytes())
    assert len(load_dataset(folder)["train"]) == 2


def test_a_row_may_name_an_image_inside_the_dataset(photo: Path, tmp_path: Path) -> None:
    image = tmp_path / "data" / "images" / "a.jpg"
    folder = parquet(tmp_path / "data", str(image), None)
    image.parent.mkdir()
    image.write_bytes(photo.read_bytes())
    assert len(load_dataset(folder)["train"]) == 2


def test_a_row_may_not_reach_outside_through_a_link(photo: Path, tmp_path: Path, m2f: Command) -> None:
    link = tmp_path / "data" / "a.jpg"
    folder = parquet(tmp_path / "data", str(link), None)
    link.symlink_to(photo)
    ran = m2f("check", folder)
    assert ran.status == 2
    assert "expected the bytes of an image, or a path inside" in ran.out


def yolo(folder: Path, photo: Path, text: str) -> Path:
    """A YOLO data set with this data.yaml."""
    for name in ("images", "labels"):
        (folder / "train" / name).mkdir(parents=True)
    (folder / "train" / "images" / "a.jpg").write_bytes(photo.read_bytes())
    (folder / "train" / "labels" / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (folder / "data.yaml").write_text(text)
    return folder


def test_aliases_that_multiply_in_a_yaml_file_are_refused(m2f: Command, photo: Path, tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    folder = yolo(tmp_path / "data", photo, "\n".join([*lines, "train: train/images", "names: *a11"]))
    ran = m2f("check", folder)
    assert ran.status == 2
    assert "data.yaml" in ran.out
    assert "the alias *a0 is of a list or mapping" in ran.out


def test_a_yaml_file_that_is_nested_too_deeply_is_refused(m2f: Command, photo: Path, tmp_path: Path) -> None:
    folder = yolo(tmp_path / "data", photo, "train: train/images\nnames: " + "[" * 20000)
    ran = m2f("check", folder)
    assert ran.status == 2
    assert "data.yaml: can't be read as YAML" in ran.out


def test_an_alias_of_a_single_value_is_read(m2f: Command, photo: Path, tmp_path: Path) -> None:
    text = "train: &where train/images\nval: *where\nnames: [cat]\n"
    ran = m2f("check", yolo(tmp_path / "data", photo, text))
    assert "(YOLO)" in ran.out


def test_json_that_is_nested_too_deeply_is_refused(m2f: Command, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(photo.read_bytes())
    start = json.dumps({"images": [], "categories": [], "annotations": []})[:-2]
    (folder / "_annotations.coco.json").write_text(start + "[" * 200000)
    ran = m2f("check", folder.parent)
    assert ran.status == 2
    assert "Traceback" not in ran.err
