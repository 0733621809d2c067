"""OpenVINO files: their logits beside the model's, their arithmetic, and the import without telemetry."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.export.export import export_model
from m2f_trainer.export.openvino import import_openvino
from m2f_trainer.export.parity import HALF, check_export
from m2f_trainer.inference.predictor import Predictor
from tests.export.models import assert_equal_at_any_size, model_of
from tests.export.test_export import example
from tests.model.tiny import DINOV2, VIT

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("openvino", "onnxscript")),
    reason="the extra `openvino` is not installed",
)


def test_openvino_is_imported_without_its_telemetry() -> None:
    assert import_openvino().Core().available_devices
    assert sys.modules.get("openvino_telemetry") is None


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [VIT, DINOV2], ids=["dinov3_vit", "dinov2"])
def test_an_openvino_file_equals_the_model_at_any_size(backbone: dict[str, object], tmp_path: Path) -> None:
    fields = {"quality_weight": 1.0, "matrix_nms": True}
    model = model_of(backbone, image_size=(56, 56) if backbone is DINOV2 else (64, 64), **fields)
    path = export_model(model, "openvino", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.json", "model.xml"]
    assert_equal_at_any_size(model, path)


@pytest.mark.slow
def test_the_example_equals_the_predictor_and_half_of_the_bytes_suffice(tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(1, 2, 0)) / "valid"
    model = model_of(VIT, thresholds=[0.0] * 3)
    half = export_model(model, "openvino", tmp_path / "half", half=True)
    assert check_export(model, half, None, 4, HALF, fixed_size=False).met
    path = export_model(model, "openvino", tmp_path / "full")
    assert half.with_suffix(".bin").stat().st_size < 0.6 * path.with_suffix(".bin").stat().st_size
    constants = json.loads(path.with_name("model.json").read_text(encoding="utf-8"))
    assert constants["compile_options"] == {"INFERENCE_PRECISION_HINT": "f32"}
    network = example().open_network(path, constants)  # type: ignore[attr-defined]
    for file in (*data.glob("*.png"), *data.glob("*.jpg")):
        found = list(example().predict(network, constants, Image.open(file).convert("RGB")))  # type: ignore[attr-defined]
        (expected,) = Predictor(model)(file)
        assert len(found) == len(expected) > 0
        found.sort(key=lambda instance: -instance[1])
        np.testing.assert_allclose([score for _, score, _ in found], expected.scores, atol=1e-4)
        for index, (_, _, inside) in enumerate(found):
            assert (inside != expected.mask(index).astype(bool)).mean() < 1e-3
