"""From the untouched export of a tool to a trained model, in one command."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.doctor.examine import examine
from tests.data.exports import EXPORTS, coco, dump, pictures
from tests.data.test_mask_images import masked

RECIPE = ["quickstart", "--max_steps", "2", "--checkpointing_steps", "2", "--dataloader_num_workers", "0"]
SIZE = ["--image_height", "64", "--image_width", "64", "--per_device_train_batch_size", "2"]


def lvis(root: Path) -> Path:
    """lvis_v1_*.json has no `file_name` and no `iscrowd`; images of its validation split lie in train2017 too."""
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        content = coco([f"{k:012}.png" for k in numbers])
        for image in content["images"]:
            folder = "val2017" if split == "val" and image["id"] > 1 else "train2017"
            pictures(root / folder, [image["file_name"]])
            image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image.pop('file_name')}"
        for one in content["annotations"]:
            del one["iscrowd"]
        dump(root / f"annotations/lvis_v1_{split}.json", content)
    return root


TOOLS = {
    **{tool: EXPORTS[tool] for tool in ("fiftyone", "labelme", "roboflow", "cvat", "label studio", "vgg")},
    **{tool: EXPORTS[tool] for tool in ("supervisely", "datumaro", "hugging face imagefolder", "ultralytics")},
    "lvis": lvis,
    "masks": lambda root: masked(root, (3, 4, 5, 3, 4)),
}
FAST = ("fiftyone", "labelme", "masks")


@pytest.mark.parametrize(
    "tool", [tool if tool in FAST else pytest.param(tool, marks=pytest.mark.slow) for tool in TOOLS]
)
def test_one_command_trains_on_the_untouched_export(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    root = TOOLS[tool](tmp_path / "set")
    run = tmp_path / "run"
    assert main(["train", *RECIPE, *SIZE, "--dataset_name", str(root), "--output_dir", str(run)]) == 0
    assert (run / "model.safetensors").is_file()
    assert (run / "metrics.json").is_file()
    assert f"m2f evaluate {run} {root}" in capsys.readouterr().out


def test_lvis_names_its_images_by_their_address_and_shares_folders(tmp_path: Path) -> None:
    root = lvis(tmp_path / "set")
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 5, "valid": 3}
    assert [[one["area"] for one in row["objects"]] for row in splits["valid"]] == [[80]] * 3
    assert splits["valid"][0]["image"]["path"].endswith("train2017/000000000005.png")
    assert "valid annotations/lvis_v1_val.json, images in train2017, val2017" in examine(root).files
