"""The tutorial of recipes/README.md, command by command, on a small dataset and a small model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2f_trainer.cli.main import build_parser
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.export.export import FILES
from tests.training.runs import ROOT, TINY

TEXT = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
SECTION = "## From a labelled folder to a served model"


def commands(number: int = 0) -> list[str]:
    """The commands of a block of the section."""
    block = re.findall(r"```bash\n(.*?)```", TEXT.partition(SECTION)[2], flags=re.DOTALL)[number]
    return [line.partition("  #")[0] for line in block.splitlines() if not line.startswith("pip install")]


def run(command: str, folder: Path) -> str:
    """What a command prints; `m2f` and `python` are this interpreter's."""
    program, *arguments = shlex.split(command)
    start = {"m2f": [sys.executable, "-m", "m2f_trainer"], "python": [sys.executable]}[program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_way_to_serve_a_model_is_a_command_that_parses() -> None:
    parsed = [build_parser().parse_args(shlex.split(line)[1:]) for line in commands(1)]
    assert {arguments.format for arguments in parsed if "format" in arguments} == FILES.keys()
    assert len({arguments.output_dir for arguments in parsed if "output_dir" in arguments}) == len(parsed) - 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tutorial_leads_from_a_labelled_folder_to_predictions_of_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    write_sample(tmp_path / "my_coco", images=(8, 3, 2))
    (tmp_path / "new_photos").mkdir()
    picture = next((tmp_path / "my_coco" / "test").glob("*.jpg"), None) or next(
        (tmp_path / "my_coco").glob("test/*.png")
    )
    shutil.copy(picture, tmp_path / "new_photos" / "a.jpg")
    (tmp_path / "small.json").write_text(json.dumps({**TINY, "max_steps": 8, "checkpointing_steps": 8}))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    outputs = {
        line.split()[1]: run(line.replace("dinov3_vits16plus_1024", "small.json"), tmp_path) for line in commands()
    }
    assert list(outputs) == ["check", "train", "evaluate", "predict", "export", "recipes/predict_exported.py"]
    for before, after in (("check", "m2f train"), ("train", "m2f evaluate"), ("evaluate", "m2f predict"),
                          ("predict", "m2f export"), ("export", "python recipes/predict_exported.py")):  # fmt: skip
        assert re.search(rf"Next:\n(  .*\n)*  {re.escape(after)} ", outputs[before]), before
    assert "parity is met" in outputs["export"]
    assert (tmp_path / "new_photos" / "a.instances.png").is_file()
    assert json.loads((tmp_path / "predictions" / "_annotations.coco.json").read_text())["images"]
    assert "pictures/worst_1.jpg" in (tmp_path / "runs" / "first" / "README.md").read_text()
