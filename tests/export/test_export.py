"""Exported files: their logits, the constants written beside them, and the parity measurement."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.images import open_image
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.tiles import Tile, lay_tiles
from m2f_trainer.errors import MissingPackageError, ModelFolderError
from m2f_trainer.export.export import export_constants, export_model, save_program
from m2f_trainer.export.parity import HALF, Runner, check_export
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.inference.tiles import Piece, merge_pieces
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


def example() -> Any:
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
    found = example().read_rgb(tmp_path / "a.png", pixel_range)
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
    assert constants["tiles"] is None
    network = module.open_network(path, constants)
    for file in sorted(data.glob("*.png")) + sorted(data.glob("*.jpg")):
        (expected,) = Predictor(model)(file)
        assert len(expected)
        assert_equal(module.predict(network, constants, Image.open(file).convert("RGB")), expected)
    assert len(run_example(path, file)) == len(expected)


def assert_equal(found: Iterable[tuple[dict[str, Any], float, NDArray[np.bool_]]], expected: Instances) -> None:
    """Assert that the example found what the predictor found."""
    best_first = sorted(found, key=lambda instance: -instance[1])
    np.testing.assert_allclose([score for _, score, _ in best_first], expected.scores, atol=1e-4)
    assert [category["id"] for category, _, _ in best_first] == expected.category_ids.tolist()
    for index, (_, _, inside) in enumerate(best_first):
        assert (inside != expected.mask(index).astype(bool)).mean() < 1e-3


def start_example(*arguments: object) -> subprocess.Popen[str]:
    """Start the example as users do, without this package."""
    command, environment = [sys.executable, str(EXAMPLE), *map(str, arguments)], {**os.environ, "PYTHONPATH": ""}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_example(path: Path, image: Path) -> list[dict[str, Any]]:
    """Run the example; return what it prints."""
    with start_example(path, image) as run:
        out, errors = run.communicate()
    assert run.returncode == 0, errors
    assert image.with_suffix(".instances.png").is_file()
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[M2FModel, Path]:
    """A model of tiles, and its exported file."""
    model = model_of(SMALL, tile_size=40, tile_overlap=0.25)
    model.config.thresholds = [0.05, 0.0, 0.1]
    return model, export_model(model, "torch", tmp_path_factory.mktemp("tiled"), fixed_size=True)


def test_the_example_predicts_in_tiles_as_the_predictor_does(tiled: tuple[M2FModel, Path], tmp_path: Path) -> None:
    model, path = tiled
    noise = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (expected,) = Predictor(model)(tmp_path / "a.png")
    assert len(expected)
    found = run_example(path, tmp_path / "a.png")
    found.sort(key=lambda instance: -instance["score"])
    np.testing.assert_allclose([one["score"] for one in found], expected.scores, atol=2e-4)
    assert [one["id"] for one in found] == expected.category_ids.tolist()
    np.testing.assert_allclose(
        [one["pixels"] for one in found], [expected.mask(index).sum() for index in range(len(expected))], atol=2
    )


def test_the_example_ends_with_a_message_and_not_with_a_traceback(tiled: tuple[M2FModel, Path], tmp_path: Path) -> None:
    _, path = tiled
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.instances.png").mkdir()  # can't be written by any user
    for arguments, status, message in (
        (["--help"], 0, r"usage: predict_exported\.py \[-h\] model IMAGE \[IMAGE \.\.\.\]"),
        ([path], 2, "the following arguments are required: IMAGE"),
        ([path, tmp_path / "a.png"], 1, r"a\.instances\.png can't be written .*: copy the image to a folder"),
        ([path, tmp_path / "b.png"], 1, r"b\.png: there is no such file"),
        ([tmp_path / "model.onnx", tmp_path / "a.png"], 1, r"model\.onnx: there is no such file"),
        ([path, path.with_name("model.json")], 1, r"model\.json can't be read as an image: cannot identify"),
    ):
        with start_example(*arguments) as run:
            out, errors = run.communicate()
        assert run.returncode == status, errors
        assert re.search(message, errors + out)
        assert "Traceback" not in errors
    with start_example(path, tmp_path / "a.png") as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == ("", 141)


@pytest.mark.parametrize("tiles", [{}, {"tiles": {"side": 64, "cut_score": 0.3}}])
def test_the_example_refuses_constants_of_older_versions(tiles: dict[str, Any], tmp_path: Path) -> None:
    """The former `tiles` had no `candidates`, and before them there were none."""
    for name, content in (("model.pt2", ""), ("model.json", json.dumps(tiles)), ("a.png", "")):
        (tmp_path / name).write_text(content)
    with start_example(tmp_path / "model.pt2", tmp_path / "a.png") as run:
        _, errors = run.communicate()
    expected = "was exported by an older version, whose `tiles` are incomplete: export the model again"
    assert (run.returncode, errors) == (1, f"{tmp_path / 'model.pt2'} {expected}\n")


class Colours(Runner):
    """Finds discs by their colour: the query k is sure of the pixels of red value 20 k + 20, the surer the larger."""

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As an exported file of stride 1."""
        queries = torch.arange(self.config.num_queries)
        red = pixel_values[:, :1].float()  # (B, 1, H, W)
        masks = (8 - (red - 20 - 20 * queries[:, None, None]).abs()) * pixel_mask[:, None]  # (B, Q, H, W)
        area = (masks > 0).float().mean((2, 3))
        classes = torch.full((*area.shape, len(self.config.categories or []) + 1), -9.0)
        classes[:, queries, queries % 2] = 4 * area.sqrt()
        classes[:, :, -1] = 0
        return classes, masks


@pytest.mark.parametrize("size", [(150, 210), (64, 200), (30, 40)])
@pytest.mark.parametrize(("side", "overlap"), [(64, 0.3), (50, 0.0), (90, 0.45)])
def test_objects_that_seams_cut_are_merged_by_the_example_as_by_the_predictor(
    size: tuple[int, int], side: int, overlap: float
) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    pixels, rng = np.zeros((*size, 3), np.uint8), np.random.default_rng(side)
    for number in range(12):
        cy, cx, radius = rng.integers(size[0]), rng.integers(size[1]), rng.integers(4, 4 + min(size) // 4)
        pixels[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = 20 + 20 * number
    model = Colours(model_of(SMALL, tile_size=side, tile_overlap=overlap, num_queries=12).config)

    def network(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        return [logits.numpy() for logits in model.run(torch.from_numpy(pixels), torch.from_numpy(mask))]

    predictor = Predictor(model)  # type: ignore[arg-type]
    (everything,) = predictor(pixels, threshold=0.5)
    assert len(everything) > 3
    middle = everything.scores.mean()  # above the scores of some pieces of objects that score higher
    for model.config.thresholds in ([0.55, 0.5, 0.5], [middle, middle - 0.01, middle]):
        constants = export_constants(model.config, "onnx", half=False, fixed_size=True)
        (expected,) = predictor(pixels)
        assert len(expected)
        assert_equal(example().predict(network, constants, Image.fromarray(pixels)), expected)


def random_pieces(tiles: Sequence[Tile], size: tuple[int, int], rng: np.random.Generator) -> list[Piece]:
    """Pieces of random discs, each tile's moved and scored by chance, and some forgotten."""
    y, x = np.mgrid[: size[0], : size[1]]
    pieces = []
    for number in range(40):
        cy, cx, radius = rng.integers(size[0]), rng.integers(size[1]), rng.integers(2, 40)
        for tile, place in enumerate(tiles):
            x0, y0, x1, y1 = place.box
            dy, dx = rng.integers(-3, 4, 2)
            mask = ((y - cy - dy) ** 2 + (x - cx - dx) ** 2 <= radius**2)[y0:y1, x0:x1]
            if not mask.any() or rng.random() < 0.15:
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            tight = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            box = (x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1)
            pieces.append(Piece(tile, number % 2, rng.random(), box, int(tight.sum()), np.packbits(tight)))
    return pieces


@pytest.mark.parametrize("seed", range(10))
def test_the_example_merges_pieces_that_agree_poorly_as_the_predictor_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(60, 220)), int(rng.integers(60, 220)))
    side, overlap = int(rng.integers(40, 100)), float(rng.uniform(0, 0.49))
    module, tiles = example(), lay_tiles(size, side, overlap)
    laid = module.lay_tiles(size, side, overlap)
    assert laid == [(tile.box, tile.core) for tile in tiles]
    pieces = random_pieces(tiles, size, rng)
    expected = merge_pieces(0, tiles, pieces, size)
    config = model_of(SMALL, tile_size=side, tile_overlap=overlap).config
    rules = export_constants(config, "onnx", half=False, fixed_size=True)["tiles"]
    same = [module.Piece(one.tile, one.category_id, one.score, one.box, one.mask, one.area) for one in pieces]
    found = module.merge(same, laid, size, rules)
    assert [piece.label for piece in found] == expected.category_ids.tolist()
    np.testing.assert_allclose([piece.score for piece in found], expected.scores)
    for index, piece in enumerate(found):
        x0, y0, x1, y1 = piece.box
        mask = np.zeros(size, np.bool_)
        mask[y0:y1, x0:x1] = piece.mask
        assert np.array_equal(mask, expected.mask(index))
