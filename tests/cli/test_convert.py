"""`m2f convert`: a checkpoint of the original script becomes a model of this package."""

from pathlib import Path

import pytest
import torch

from m2f_trainer.cli.main import main
from m2f_trainer.model.mask2former import load_model
from tests.model.test_original_script import checkpoint


@torch.no_grad()
def test_a_converted_checkpoint_is_a_model_with_the_same_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = checkpoint(tmp_path / "step_200_model")
    assert main(["convert", str(tmp_path / "step_200_model"), str(tmp_path / "converted")]) == 0
    out = capsys.readouterr().out
    assert "2 classes (cat, dog)" in out
    assert "Not for commercial use" in out
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    found, expected = load_model(str(tmp_path / "converted"))(pixels), theirs(pixel_values=pixels)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "converted" / "preprocessor_config.json").is_file()
    assert main(["convert", str(tmp_path / "step_200_model"), str(tmp_path / "converted")]) == 1
    assert "exists already. Give a new folder" in capsys.readouterr().err
