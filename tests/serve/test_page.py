"""The script of the server's page reads masks and chooses colours as the package does."""

import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from m2f_trainer.masks.segmentation import encode
from m2f_trainer.viz.html import template_environment
from m2f_trainer.viz.overlay import color

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def evaluate(expression: str, values: Any) -> Any:
    """The value of an expression of the script's functions, for each of these values under the name `value`."""
    script = template_environment().get_template("serve.js").render().partition("// A mask as a picture")[0]
    stub = 'const document = {querySelector: () => ({dataset: {model: \'{"categories": [], "thresholds": {}}\'}})};'
    program = f"{stub}\n{script}\nconsole.log(JSON.stringify({json.dumps(values)}.map(value => {expression})));"
    run = subprocess.run([str(NODE), "-"], input=program, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_masks_are_those_of_the_compressed_run_lengths() -> None:
    generator = np.random.default_rng(0)
    masks = [(generator.random((31, 17)) > share).astype(np.uint8) for share in (0.02, 0.5, 0.99)]
    masks += [np.zeros((400, 300), np.uint8), np.ones((400, 300), np.uint8)]
    masks[3][100:390, 7:250] = 1
    entries = [{"size": list(mask.shape), "counts": encode(mask)} for mask in masks]
    found = evaluate("{const mask = maskOf(value); return {...mask, bits: [...mask.bits]}}", entries)
    for one, mask in zip(found, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (one["x0"], one["x1"]) == (columns[0], columns[-1] + 1)
        assert one["y0"] <= rows[0]
        assert one["y1"] >= rows[-1] + 1
        whole = np.zeros_like(mask)
        part = np.reshape(one["bits"], (one["x1"] - one["x0"], one["rows"])).T
        whole[one["y0"] : one["y1"], one["x0"] : one["x1"]] = part
        assert (whole == mask).all()
        assert one["area"] == mask.sum()


def test_colours_are_those_of_the_overlays() -> None:
    assert evaluate("color(value)", list(range(12))) == [list(color(index)) for index in range(12)]
