"""`m2f export`: the exit status is 0 if the file equals the model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def stand_in_for_the_export(monkeypatch: pytest.MonkeyPatch, path: Path, check: Callable[..., object]) -> None:
    """Neither load nor trace a model: the file is `path`, and `check` compares it."""
    stand_in(monkeypatch, "m2f_trainer.export.export", CONSTANTS="model.json", export_model=lambda *_, **__: path)
    stand_in(
        monkeypatch,
        "m2f_trainer.export.parity",
        FULL=1,
        HALF=2,
        INT8=3,
        check_export=check,
        recorded_dataset=lambda _: None,
        validation_rows=lambda _, dataset: dataset,
    )
    stand_in(monkeypatch, "m2f_trainer.export.quantize", calibration_frames=lambda *given: list(given))
    stand_in(monkeypatch, "m2f_trainer.model.mask2former", load_model=lambda _: SimpleNamespace(config=None))


@pytest.mark.parametrize(("met", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_is_the_parity(
    met: bool, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder is called as the model's user
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(1_500_000))
    parity = SimpleNamespace(met=met, to_text=lambda: "largest difference: 1e-6")
    stand_in_for_the_export(monkeypatch, path, lambda *_: parity)
    assert main(["export", "user/model"]) == status
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: 1.5 MB. {tmp_path / 'model.json'} describes how to use it.\n")
    assert "compared on synthetic images" in out
    assert "largest difference: 1e-6" in out
    assert ("python recipes/predict_exported.py" in out) is met


def test_the_files_of_a_validation_dataset_can_be_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt2"
    path.write_bytes(b"")
    asked: list[object] = []
    parity = SimpleNamespace(met=True, to_text=str)
    stand_in_for_the_export(monkeypatch, path, lambda *given: (asked.append(given[2:4]), parity)[1])
    files = ["--annotations", "valid=a.json", "--images", "valid=photos"]
    assert main(["export", "user/model", "--validation", "coco", *files, "--num_images", "3"]) == 0
    expected = {"annotations": ["valid=a.json"], "images": ["valid=photos"], "exif_frame": "auto"}
    expected |= {"follow_links": False, "max_pixels": None}
    assert asked == [({"dataset_name": "coco", **expected}, 3)]
    for options, names in ((files, "--annotations, --images"), (["--max_pixels", "9"], "--max_pixels")):
        assert main(["export", "user/model", *options]) == 1
        assert f"{names} without --validation DATASET" in capsys.readouterr().err


def test_int8_needs_openvino_and_images_and_has_limits_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.xml"
    for file in (path, path.with_suffix(".bin")):
        file.write_bytes(bytes(1_000_000))
    asked: list[object] = []
    parity = SimpleNamespace(met=True, to_text=str)
    stand_in_for_the_export(monkeypatch, path, lambda *given: (asked.append(given[4]), parity)[1])
    assert main(["export", "user/model", "--int8", "--validation", "coco"]) == 1
    assert "--int8 needs --format openvino, got --format onnx" in capsys.readouterr().err
    installed: dict[str, object] = dict.fromkeys(("onnx", "onnxscript", "openvino"), object())
    monkeypatch.setattr("importlib.util.find_spec", installed.get)
    assert main(["export", "user/model", "--int8", "--format", "openvino", "--validation", "coco"]) == 1
    assert "needs nncf, which is not installed: pip install 'm2f-trainer[int8]'" in capsys.readouterr().err
    installed["nncf"] = object()
    assert main(["export", "user/model", "--int8", "--format", "openvino"]) == 1
    assert "give --validation DATASET" in capsys.readouterr().err
    assert main(["export", "user/model", "--int8", "--format", "openvino", "--validation", "coco"]) == 0
    assert asked == [3]
    out = capsys.readouterr().out
    assert f"{path} and {path.with_suffix('.bin')}: 2.0 MB." in out
    assert "python recipes/predict_exported.py" in out
