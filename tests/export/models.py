"""A model for the synthetic dataset."""

from m2f_trainer.model.mask2former import M2FModel
from tests.model.tiny import VIT, tiny_model

SHAPES = [{"id": k, "name": name} for k, name in enumerate(("circle", "square", "triangle"), 1)]


SMALL = {**VIT, "num_hidden_layers": 1}


def model_of(backbone: dict[str, object], **fields: object) -> M2FModel:
    """A model for the synthetic dataset, with masks that differ from each other."""
    return tiny_model(backbone, categories=SHAPES, **{"decoder_layers": 2, **fields}).eval()
