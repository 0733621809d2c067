"""From the untouched export of a tool to a trained model, in one command."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.data.exports import EXPORTS
from tests.data.test_mask_images import masked

RECIPE = ["quickstart", "--max_steps", "2", "--checkpointing_steps", "2", "--dataloader_num_workers", "0"]
SIZE = ["--image_height", "64", "--image_width", "64", "--per_device_train_batch_size", "2"]


@pytest.mark.parametrize("tool", ["fiftyone", "labelme", "masks"])
def test_one_command_trains_on_the_untouched_export(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    root = masked(tmp_path / "set", (3, 4, 5, 3, 4)) if tool == "masks" else EXPORTS[tool](tmp_path / "set")
    run = tmp_path / "run"
    assert main(["train", *RECIPE, *SIZE, "--dataset_name", str(root), "--output_dir", str(run)]) == 0
    assert (run / "model.safetensors").is_file()
    assert (run / "metrics.json").is_file()
    assert f"m2f evaluate {run} {root}" in capsys.readouterr().out
