"""Untrusted runs and recipes: nothing is deleted or opened without request, and no field is treated as markup."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2f_trainer.errors import ModelFolderError
from m2f_trainer.hub.model_card import CardOptions, render_card
from tests.evaluation.test_report import write_run
from tests.hub.folder import write_model
from tests.security.conftest import Command, change

EVIL = "</code>[x](javascript:alert(1))<script>|\n---\n# owned"


def test_a_recipe_deletes_no_checkpoints(m2f: Command, recipe: Callable[..., Path], tmp_path: Path) -> None:
    former = tmp_path / "run" / "checkpoint-7"
    former.mkdir(parents=True)
    ran = m2f("train", recipe(overwrite_output_dir=True))
    assert ran.status == 1
    assert "a recipe deletes no checkpoints" in ran.err
    assert former.is_dir()
    assert m2f("train", recipe(), "--overwrite_output_dir", "true").status == 0
    assert not former.is_dir()
    assert m2f("train", tmp_path / "run" / "recipe.json", "--resume_from_checkpoint", "true").status == 0


def test_a_report_opens_no_dataset_unasked(m2f: Command, dataset: Path, tmp_path: Path) -> None:
    folder, page = write_run(tmp_path / "run", dataset), tmp_path / "page.html"
    assert m2f("report", folder, "--output", page).status == 0
    assert "data:image/jpeg" not in page.read_text()
    assert m2f("report", folder, "--output", page, "--images").status == 0
    assert "data:image/jpeg" in page.read_text()


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"neck": EVIL, "image_height": EVIL, "num_queries": EVIL, "backbone_name": EVIL}),
        ("config.json", {"categories": [{"id": 1, "name": EVIL}]}),
        ("config.json", {"head_checkpoint": EVIL, "init_from": EVIL}),
        ("recipe.json", {"dataset_name": EVIL, "tune": EVIL, "backbone": EVIL, "optim": EVIL}),
        ("fingerprint.json", {"train_images": 5, "train_data": EVIL, "valid_data": EVIL}),
        (
            "evaluation.json",
            {"shown": {"worst": [{"found": EVIL, "wrong": 1, "missed": 1}], "best": []}, "classes": [], "errors": {}},
        ),
        (
            "trainer_state.json",
            {
                "global_step": 1,
                "epoch": 1,
                "stateful_callbacks": {
                    "Cost": {
                        "attributes": {
                            "seconds": 1, "peak_memory": 1, "processes": EVIL, "hardware": EVIL, "software": EVIL,
                        }
                    }
                },
            },
        ),
        ("metrics.json", {"eval_map": EVIL}),
        ("metrics.json", {f"eval_map_class/{EVIL}": 0.5, "eval_map": 0.5}),
    ],
)  # fmt: skip
def test_no_field_of_a_run_is_markup_in_the_card(file: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "worst_1.jpg").write_bytes(b"")
    path = folder / file
    path.write_text(path.read_text() if path.is_file() else "{}")
    change(path, **fields)
    text = "---\n---\n"
    with contextlib.suppress(ModelFolderError):  # a value of a wrong type is refused
        text = render_card(folder, CardOptions(pictures=True))
    body = re.sub("`[^`]*`", "", text.split("---\n", 2)[2])  # code shows what is in it
    assert "<script>" not in body
    assert "](javascript:" not in body
    assert "# owned" not in text.splitlines()


def test_a_damaged_value_in_a_run_is_no_traceback(m2f: Command, dataset: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", dataset)
    details = json.loads((folder / "evaluation.json").read_text())
    change(folder / "evaluation.json", classes=[{"name": 5}], confusion=details["confusion"])
    ran = m2f("report", folder, "--output", tmp_path / "page.html")
    assert ran.status == 1
    assert "a value in its files is missing or of a wrong type" in ran.err
