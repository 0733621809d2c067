"""Exported files: their logits, the constants written beside them, and the parity measurement."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.images import open_image
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import MissingPackageError, ModelFolderError
from m2f_trainer.export.export import export_model, save_program
from m2f_trainer.export.parity import HALF, check_export
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.mask2former import M2FModel
from tests.export.models import SHAPES, SMALL, assert_equal_at_any_size, model_of
from tests.model.tiny import CONVNEXT, DINOV2, VIT, images

EXAMPLE = Path(__file__).parents[2] / "recipes" / "predict_exported.py"


def logits(model: M2FModel, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = model(pixels, torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.bool))
    return [output.class_queries_logits, output.masks_queries_logits]


def test_a_torch_program_gives_the_models_logits_for_any_number_of_images(tmp_path: Path) -> None:
    model = model_of(SMALL)
    path = export_model(model, "torch", tmp_path, fixed_size=True)
    program = torch.export.load(path).module()
    for count in (1, 3):
        pixels = images(count)
        found = program(pixels, torch.ones(count, 64, 64, dtype=torch.bool))
        for one, other in zip(found, logits(model, pixels), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    constants = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert constants["postprocessing"]["categories"] == SHAPES
    assert constants["preprocessing"]["image_height"] == 64
    assert constants["inputs"]["sides"] == "64 x 64 only"


def test_a_weight_without_elements_that_points_into_other_memory_is_saved(tmp_path: Path) -> None:
    """As the register tokens of a DINOv3 without any, loaded from a file."""

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(8)[:0].view(1, 0, 4))

        def forward(self, features: Tensor) -> Tensor:
            return 2 * torch.cat([self.tokens, features], dim=1)

    program, features = torch.export.export(Double(), (torch.zeros(1, 3, 4),)), torch.rand(1, 3, 4)
    save_program(program, tmp_path / "a.pt2")
    loaded = torch.export.load(tmp_path / "a.pt2")
    assert torch.equal(loaded.module()(features), 2 * features)
    assert isinstance(loaded.state_dict["tokens"], nn.Parameter)
    assert loaded.state_dict["tokens"].shape == (1, 0, 4)


def test_a_model_of_small_images_is_exported_for_its_own_size_only(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"images of 64 x 64.* from 128 x 128 on\. Export it with --fixed_size"):
        export_model(model_of(CONVNEXT), "torch", tmp_path)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingPackageError, match=r"needs onnxscript, which is not installed.*m2f-trainer\[export\]"):
        export_model(model_of(SMALL), "onnx", tmp_path)


def example() -> object:
    """The module of the example, which does not import this package."""
    spec = importlib.util.spec_from_file_location("predict_exported", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pixel_range", [None, (0.0, 4095.0), "image"])
def test_the_example_scales_values_of_more_than_8_bits_as_the_predictor_does(
    pixel_range: PixelRange, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    values = np.linspace(100, 3000, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = open_image(tmp_path / "a.png", "a", displayed=True, pixel_range=pixel_range)
    found = example().read_rgb(tmp_path / "a.png", pixel_range)  # type: ignore[attr-defined]
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "fields", "portable"),
    [
        (VIT, {}, False),
        (DINOV2, {}, False),
        (CONVNEXT, {}, False),
        (VIT, {"quality_weight": 1.0, "matrix_nms": True}, False),
        (VIT, {"neck": "top_down", "encoder_layers": 0}, False),
        (CONVNEXT, {"neck": "top_down", "encoder_layers": 0}, False),
        (VIT, {}, True),
        (CONVNEXT, {}, True),
    ],
    ids=[
        "dinov3_vit",
        "dinov2",
        "dinov3_convnext",
        "ranking",
        "top_down",
        "top_down dinov3_convnext",
        "portable",
        "portable dinov3_convnext",
    ],
)
def test_an_onnx_file_equals_the_model_at_any_size(
    backbone: dict[str, object], fields: dict[str, object], portable: bool, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    size = (56, 56) if backbone is DINOV2 else (128, 128) if backbone is CONVNEXT else (64, 64)
    model = model_of(backbone, image_size=size, **fields)
    path = export_model(model, "onnx", tmp_path, portable=portable)
    operators = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))["operators"]
    assert ("GridSample" in operators) is (not portable and fields.get("encoder_layers") != 0)
    assert_equal_at_any_size(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("portable", [True, False])
def test_the_tensorrt_page_lists_the_operators_and_inputs_of_a_real_export(portable: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    page = Path(__file__).parents[2].joinpath("recipes", "tensorrt.md").read_text(encoding="utf-8")
    path = export_model(model_of({**SMALL, "patch_size": 16}, neck="adapter"), "onnx", tmp_path, portable=portable)
    graph = onnx.load(path).graph
    names = sorted({node.op_type for node in graph.node})
    assert json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))["operators"] == names
    assert "\n\n" + ", ".join(names) + "\n\n" in page.replace(",\n", ", ")
    resizes = [attribute for node in graph.node if node.op_type == "Resize" for attribute in node.attribute]
    assert not any(attribute.i for attribute in resizes if attribute.name == "antialias")
    ranks = {one.name: len(one.type.tensor_type.shape.dim) for one in graph.input}
    for shapes in re.findall(r"--(?:min|opt|max)Shapes=(\S+)", page):
        given = dict(one.split(":") for one in shapes.split(","))
        assert {name: len(shape.split("x")) for name, shape in given.items()} == ranks


@pytest.mark.slow
def test_the_example_equals_the_predictor_and_a_float16_file_nearly_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    data = write_sample(tmp_path / "data", images=(1, 2, 0)) / "valid"
    model = model_of(VIT)
    model.config.thresholds = [0.0] * len(model.config.categories)
    half = export_model(model_of(VIT), "onnx", tmp_path / "half", half=True)
    assert check_export(model, half, None, 4, HALF, fixed_size=False).met
    path = export_model(model, "onnx", tmp_path / "full")
    assert half.stat().st_size < path.stat().st_size
    module = example()
    constants = json.loads(path.with_name("model.json").read_text(encoding="utf-8"))
    network = module.open_network(path, constants)  # type: ignore[attr-defined]
    for file in sorted(data.glob("*.png")) + sorted(data.glob("*.jpg")):
        found = list(module.predict(network, constants, Image.open(file).convert("RGB")))  # type: ignore[attr-defined]
        (expected,) = Predictor(model)(file)
        assert len(found) == len(expected) > 0
        found.sort(key=lambda instance: -instance[1])
        np.testing.assert_allclose([score for _, score, _ in found], expected.scores, atol=1e-4)
        assert [category["id"] for category, _, _ in found] == expected.category_ids.tolist()
        for index, (_, _, inside) in enumerate(found):
            assert (inside != expected.mask(index).astype(bool)).mean() < 1e-3
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), str(path), str(file)], check=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0
    assert file.with_suffix(".instances.png").is_file()
