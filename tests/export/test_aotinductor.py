"""AOTInductor packages: the compiler they need, their logits beside the model's, and their instances in the example."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor import config

from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import MissingPackageError
from m2f_trainer.export.export import export_model
from m2f_trainer.inference.predictor import Predictor
from tests.export.models import SMALL, assert_equal_at_any_size, model_of
from tests.export.test_export import example


def test_a_machine_without_a_compiler_is_refused_before_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f_trainer.export.export.trace", lambda *_: pytest.fail("traced"))
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(
            MissingPackageError, match=r"no compiler works here \(tried: no-such-compiler\): install one.* CXX"
        ),
    ):
        export_model(model_of(SMALL), "aotinductor", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it compiles for a minute and a half on a free core
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_package_equals_the_model_at_any_size_also_in_the_example(tmp_path: Path) -> None:
    model = model_of(SMALL, thresholds=[0.0] * 3)
    path = export_model(model, "aotinductor", tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.aoti.pt2", "model.json"]
    constants = json.loads(path.with_name("model.json").read_text(encoding="utf-8"))
    assert torch.__version__ in constants["runs_on"]
    assert "not checked" in constants["inputs"]["sides"]
    assert_equal_at_any_size(model, path)
    module = example()
    network = module.open_network(path, constants)  # type: ignore[attr-defined]
    data = write_sample(tmp_path / "data", images=(1, 1, 0)) / "valid"
    (file,) = (*data.glob("*.png"), *data.glob("*.jpg"))
    found = list(module.predict(network, constants, Image.open(file).convert("RGB")))  # type: ignore[attr-defined]
    (expected,) = Predictor(model)(file)
    assert len(found) == len(expected) > 0
    scores = sorted((score for _, score, _ in found), reverse=True)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
