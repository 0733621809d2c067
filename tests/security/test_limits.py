"""Absurd sizes in strangers' files are refused, with the limit, before they take memory or time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.security.conftest import Command, change


@pytest.mark.parametrize(("field", "value"), [("decoder_layers", 10**7), ("image_width", 2**20)])
def test_an_absurd_number_in_a_model_folder_is_refused(
    field: str, value: int, m2f: Command, model: Path, photo: Path, tmp_path: Path
) -> None:
    change(model / "config.json", **{field: value})
    ran = m2f("predict", model, photo, "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert f"{field} is {value}, and the limit is" in ran.err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"image_height": 2**20}, "image_height: expected between 1 and 16384, got 1048576"),
        ({"num_queries": 10**7}, "num_queries: expected between 1 and 10000, got 10000000"),
        ({"head_config": {"decoder_layers": 10**7}}, "decoder_layers is 10000000, and the limit is 64"),
        ({"backbone_config": {"model_type": "dinov3_vit", "num_hidden_layers": 10**7}}, "and the limit is 256"),
    ],
)
def test_an_absurd_number_in_a_recipe_is_refused(
    fields: dict[str, object], told: str, m2f: Command, recipe: Callable[..., Path]
) -> None:
    ran = m2f("train", recipe(**fields))
    assert ran.status == 1
    assert told in ran.err
