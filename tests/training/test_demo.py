"""All steps of `m2f demo`, on fewer images and steps than it takes."""

import json
from pathlib import Path

import pytest

from m2f_trainer.config.recipe import Recipe, load_recipe
from m2f_trainer.data import synthetic
from m2f_trainer.run_folder import read_metrics
from m2f_trainer.training import demo as module


def test_the_demo_trains_scores_and_draws_the_test_images_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(arguments: list[str]) -> Recipe:
        return load_recipe([*arguments, "--max_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "true"])

    monkeypatch.setattr(module, "write_sample", lambda root: synthetic.write_sample(root, images=(8, 2, 3)))
    monkeypatch.setattr(module, "load_recipe", small)
    said: list[str] = []
    for _ in range(2):
        module.demo(tmp_path, say=said.append)
    figures = read_metrics(tmp_path / "run" / "metrics.json")
    assert said[:2] == said[2:], "the second demo starts anew and ends the same"
    assert said[0] == (
        f"mask AP on the held-out images: {figures['eval_map']:.3f} (valid), {figures['test_map']:.3f} (test)"
    )
    assert len(list((tmp_path / "pictures").glob("*.instances.png"))) == 3
    truth = json.loads((tmp_path / "data" / "test" / "_annotations.coco.json").read_text())
    assert len(truth["images"]) == 3


def test_a_pretrained_backbone_takes_frames_of_its_own_patch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def stop(recipe: Recipe) -> None:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_sample", lambda root: None)
    monkeypatch.setattr(module, "train", stop)
    for backbone, side in (("dinov2-small", 112), ("dinov3-vits16", 128)):
        with pytest.raises(KeyboardInterrupt):
            module.demo(tmp_path, backbone)
        assert (seen[-1].model.backbone, seen[-1].model.backbone_config) == (backbone, None)
        assert (seen[-1].data.image_height, seen[-1].data.image_width) == (side, side)
