"""Quantization to int8: the images it is calibrated on, what stays in float, and the logits of the file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import MissingPackageError
from m2f_trainer.export.export import export_model
from m2f_trainer.export.parity import INT8, check_export, validation_rows
from m2f_trainer.export.quantize import calibration_frames, scope_of, stays_in_float
from m2f_trainer.inference.predictor import Predictor
from tests.export.models import SMALL, model_of, write_photos
from tests.model.tiny import VIT


def test_calibration_takes_the_images_that_are_not_compared_first(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(1, 3, 0))
    files = [
        entry["file_name"] for entry in json.loads((data / "valid" / "_annotations.coco.json").read_text())["images"]
    ]
    model = model_of(SMALL)
    frames = calibration_frames(model, load_coco(data)["valid"], compared=2)
    expected = list(Predictor(model).frames(data / "valid" / files[index] for index in (2, 0, 1)))
    assert len(frames) == len(expected) == 3
    for (pixels, mask), frame in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(pixels[0], frame.pixel_values.numpy())
        np.testing.assert_array_equal(mask[0], frame.pixel_mask.numpy())


def test_photos_that_were_annotated_as_they_are_stored_are_calibrated_on_as_they_are_stored(tmp_path: Path) -> None:
    rows = load_coco(write_photos(tmp_path / "data", 6))["valid"]
    model = model_of(SMALL)
    frames = calibration_frames(model, rows, compared=0)
    for (pixels, _), row in zip(frames, rows, strict=True):
        with Image.open(row["image"]["path"]) as photo:
            (expected,) = Predictor(model).frames([np.asarray(photo)])
        np.testing.assert_array_equal(pixels[0], expected.pixel_values.numpy())


def test_calibration_takes_at_most_four_tiles_of_an_image(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(1, 2, 0))
    model = model_of(SMALL, tile_size=48, tile_overlap=0.25)
    tiles = len(list(Predictor(model).frames([next((data / "valid").glob("*[gG]"))])))
    assert tiles > 4
    assert 2 < len(calibration_frames(model, load_coco(data)["valid"], compared=0)) <= 8


@pytest.mark.parametrize(
    ("module", "in_float"),
    [
        ("model.pixel_level_module.encoder.backbone.layer.0.mlp.up_proj", False),
        ("model.pixel_level_module.encoder.backbone.encoder.layer.0.mlp.fc1", False),
        ("model.pixel_level_module.encoder.backbone.encoder.layer.0.mlp.fc2", True),
        ("model.pixel_level_module.encoder.backbone.encoder.layer.0.attention.q_proj", True),
        ("model.pixel_level_module.encoder.neck.scales.0.0", True),
        ("model.pixel_level_module.decoder.encoder.layers.0.fc1", False),
        ("model.pixel_level_module.decoder.mask_projection", True),
        ("model.pixel_level_module.decoder", True),  # sampling positions and weights of deformable attention
        ("model.transformer_module", True),
        ("model.transformer_module.decoder.layers.0.fc1", True),
        ("class_predictor", True),
        ("quality_predictor.score", True),
        ("", True),
    ],
)
def test_only_feed_forward_and_pixel_decoder_layers_leave_float(module: str, in_float: bool) -> None:
    assert stays_in_float(module) is in_float


def test_an_operation_belongs_to_the_module_of_its_node() -> None:
    scopes = {"node_conv2d": "model.pixel_level_module.encoder.neck.fuse"}
    assert scope_of("node_conv2d/WithoutBiases", scopes) == "model.pixel_level_module.encoder.neck.fuse"
    assert scope_of("Constant_7", scopes) == ""


def test_a_missing_package_is_named_with_the_extra_of_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(MissingPackageError, match=r"needs nncf, which is not installed.*m2f-trainer\[int8\]"):
        export_model(model_of(SMALL), "openvino", tmp_path, calibration=[])


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("openvino", "nncf", "onnxscript")),
    reason="the extra `int8` is not installed",
)
def test_an_int8_file_is_close_to_the_model_and_names_what_is_left_in_float(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(1, 6, 0))
    model = model_of(VIT)
    frames = calibration_frames(model, load_coco(data)["valid"], compared=2)
    path = export_model(model, "openvino", tmp_path / "int8", calibration=frames)
    left = json.loads(path.with_name("model.json").read_text(encoding="utf-8"))["int8"]["left_in_float"]
    assert "class_predictor" in left
    assert any(name.startswith("model.transformer_module") for name in left)
    assert any(name.endswith("mlp.down_proj") for name in left)
    assert not any(name.endswith(("mlp.up_proj", "mlp.fc1")) for name in left)
    rows = validation_rows(model.config, {"dataset_name": str(data)})
    found = check_export(model, path, rows, 2, INT8, fixed_size=False)
    assert 0 < found.mask_logits < 0.5 * found.mask_logits_size
