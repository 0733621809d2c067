"""Comparison of an exported file with its model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from torch import Tensor

from m2f_trainer.cli import main as cli
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.export import parity
from m2f_trainer.export.parity import FULL, ModelRunner, ParityLimits, Runner, best_ious, check_export, validation_rows
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.model.mask2former import M2FConfig
from tests.export.models import SMALL, model_of, write_photos


class Faulty(ModelRunner):
    """A file whose masks are inverted."""

    def __init__(self, path: Path, config: M2FConfig) -> None:
        super().__init__(model_of(SMALL))
        self.config = config

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = super().run(pixel_values, pixel_mask)
        return classes, -masks


class Faithful(Faulty):
    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        return ModelRunner.run(self, pixel_values, pixel_mask)


@pytest.mark.parametrize(("runner", "met"), [(Faithful, True), (Faulty, False)])
def test_a_file_with_other_logits_fails_the_comparison(
    runner: type[Runner], met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.RUNNERS, "model.pt2", runner)
    found = check_export(model_of(SMALL), tmp_path / "model.pt2", None, 2, FULL, fixed_size=True)
    assert found.met is met
    assert ("NOT MET" in found.to_text()) is not met
    assert json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["met"] is met
    assert (found.mask_logits == 0) is met


def test_a_model_of_tiles_is_compared_on_every_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FaultyOnce(Faithful):
        """Differs on the fifth tile only."""

        def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
            classes, masks = super().run(pixel_values, pixel_mask)
            return classes, masks + (len(self.logits) == 4)

    model = model_of(SMALL, tile_size=48, tile_overlap=0.25)
    monkeypatch.setitem(parity.RUNNERS, "model.pt2", FaultyOnce)
    found = check_export(model, tmp_path / "model.pt2", None, 1, FULL, fixed_size=True)
    assert found.images == 1
    assert found.mask_logits == pytest.approx(1, abs=1e-4)


def test_photos_that_were_annotated_as_they_are_stored_are_compared_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation dataset whose photos viewers turn by 90 degrees gives the figures of the same photos, not turned."""
    monkeypatch.setitem(parity.RUNNERS, "model.pt2", Faithful)
    model = model_of(SMALL)
    found = [
        check_export(model, tmp_path / "model.pt2", load_coco(data)["valid"], 2, FULL, fixed_size=True)
        for data in (write_photos(tmp_path / "turned", 6), write_photos(tmp_path / "upright", 1))
    ]
    assert found[0].instances == found[1].instances > 0
    assert found[0].mask_logits_size == found[1].mask_logits_size
    assert (found[0].model_ap, found[0].file_ap) == (found[1].model_ap, found[1].file_ap)


def test_the_classes_of_a_validation_dataset_are_matched_by_name(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(1, 3, 0))
    given = load_coco(data)["valid"]
    names = {category.id: category.name for category in categories_of(given)}
    model = model_of(SMALL)
    assert model.config.categories is not None
    own = {category["id"]: category["name"] for category in model.config.categories}
    assert names != own, "the same names with other ids"
    rows = validation_rows(model.config, {"dataset_name": str(data)})
    for row, before in zip(rows, given, strict=True):
        assert [own[one["category_id"]] for one in row["objects"]] == [
            names[one["category_id"]] for one in before["objects"]
        ]


def test_a_dataset_that_cannot_be_compared_is_refused_before_the_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_of(SMALL).save_pretrained(tmp_path / "model")
    data = write_sample(tmp_path / "data", images=(1, 1, 0))
    path = data / "valid" / "_annotations.coco.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"circle"', '"disc"'), encoding="utf-8")
    (data / "train" / "_annotations.coco.json").unlink()
    argv = ["export", str(tmp_path / "model"), "--format", "torch", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--validation", str(data)]) == 1
    assert "category 1 is 'circle' in the model and 'disc' in the dataset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_difference_in_ap_alone_fails_the_comparison() -> None:
    fields = dict.fromkeys(parity.Parity.__dataclass_fields__, 1.0)
    same = parity.Parity(**{**fields, "other_size": None, "limits": ParityLimits(0.001, 0.99)})  # type: ignore[arg-type]
    assert same.met
    assert not parity.Parity(**{**vars(same), "file_ap": 0.998}).met
    assert not parity.Parity(**{**vars(same), "mask_iou": 0.98}).met
    assert not parity.Parity(**{**vars(same), "other_size": 0.06}).met


def test_a_comparison_without_any_instance_says_so() -> None:
    fields = dict.fromkeys(parity.Parity.__dataclass_fields__, 1.0)
    some = parity.Parity(**{**fields, "instances": 3, "other_size": None, "limits": FULL})  # type: ignore[arg-type]
    assert "of 3 instances scored above 0.05" in some.to_text()
    assert "only logits were compared" not in some.to_text()
    assert "no instance scored above 0.05: only logits were compared" in replace(some, instances=0).to_text()


def test_the_command_exits_with_1_where_parity_is_not_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_of(SMALL).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("m2f_trainer.export.export.trace", lambda *_: None)
    monkeypatch.setattr("m2f_trainer.export.export.save_program", lambda _, path: path.write_bytes(b"program"))
    for runner, status in ((Faulty, 1), (Faithful, 0)):
        monkeypatch.setitem(parity.RUNNERS, "model.pt2", runner)
        argv = ["export", str(tmp_path / "model"), "--format", "torch", "--output_dir", str(tmp_path / "out")]
        assert cli.main([*argv, "--num_images", "2", "--fixed_size"]) == status
    out = capsys.readouterr().out
    assert "parity is NOT MET" in out
    assert "synthetic images, where AP is meaningless" in out


def test_each_instance_is_compared_with_the_best_of_its_class() -> None:
    masks = np.zeros((3, 20, 20), np.uint8)
    masks[0, :10, :10] = masks[1, :10, :8] = masks[2, :10, :10] = 1
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]

    def instances(categories: list[int], kept: list[int], scores: list[float]) -> Instances:
        chosen = [rles[index] for index in kept]
        return Instances(0, np.array(categories), np.array(scores), chosen, tight_boxes(chosen), (20, 20))

    reference = instances([1, 1], [0, 1], [0.9, 0.04])  # the second scores too low to be compared
    assert best_ious(reference, instances([1, 2], [1, 2], [0.9, 0.8])).tolist() == [0.8]
    assert best_ious(reference, instances([2], [2], [0.9])).tolist() == [0.0]
    assert best_ious(reference, instances([], [], [])).tolist() == [0.0]
