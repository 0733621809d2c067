"""A model for the synthetic dataset."""

from pathlib import Path

from PIL import Image

from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.export.parity import FULL, check_export
from m2f_trainer.model.mask2former import M2FModel
from tests.model.tiny import VIT, tiny_model

SHAPES = [{"id": k, "name": name} for k, name in enumerate(("circle", "square", "triangle"), 1)]


SMALL = {**VIT, "num_hidden_layers": 1}


def model_of(backbone: dict[str, object], **fields: object) -> M2FModel:
    """A model for the synthetic dataset, with masks that differ from each other."""
    return tiny_model(backbone, categories=SHAPES, **{"decoder_layers": 2, **fields}).eval()


def assert_equal_at_any_size(model: M2FModel, path: Path) -> None:
    """Assert that an exported file gives the model's instances, and its logits at two sizes of images."""
    found = check_export(model, path, None, 4, FULL, fixed_size=False)
    assert found.met, found.to_text()
    assert found.mask_logits < 1e-3
    assert found.other_size is not None
    assert found.other_size < 1e-3


def write_photos(folder: Path, orientation: int) -> Path:
    """The synthetic dataset with photos of this EXIF orientation, annotated on the stored pixels."""
    data, exif = write_sample(folder, images=(1, 3, 0)), Image.Exif()
    exif[0x0112] = orientation
    for path in data.rglob("*.jpg"):
        with Image.open(path) as photo:
            photo.save(path, exif=exif, quality="keep")
    return data
