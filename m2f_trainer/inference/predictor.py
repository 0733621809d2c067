"""A model and its preprocessing, from images of any kind to Instances at their original size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2f_trainer.data.images import ImageSource
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.postprocess import to_instances
from m2f_trainer.model.mask2former import M2FModel, load_model


class Predictor:
    """`Predictor(model)(images)`: what evaluation does, for images without annotations.

    Args:
        model: a model of this package; put into evaluation mode and moved to `device` where one is given.
        device: "cuda", "cuda:1", "cpu", ...; the model stays where it is unless given.

    >>> from m2f_trainer import Predictor, build_model
    >>> vit = {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = build_model(vit, [{"id": 3, "name": "cat"}], image_size=(64, 64), num_queries=5)  # random weights
    >>> (found,) = Predictor(model)(np.zeros((40, 60, 3), np.uint8), threshold=0.0)
    >>> found.size, set(found.category_ids.tolist()) <= {3}
    ((40, 60), True)
    """

    def __init__(self, model: M2FModel, device: str | torch.device | None = None) -> None:
        self.model = model
        self.model.train(False)
        if device is not None:
            self.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides torch's signature
        categories = model.config.categories or []
        self.category_ids = [int(category["id"]) for category in categories]
        self.names = {int(category["id"]): str(category["name"]) for category in categories}
        self.padded_size = (model.config.image_height, model.config.image_width)
        self._transform = EvalTransform(*self.padded_size)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, device: str | torch.device | None = None) -> Predictor:
        """Load a model folder or a Hub id; on a GPU where there is one, unless `device` says otherwise.

        Raises:
            ModelError: the folder or id doesn't hold a model of this package.
        """
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(folder_or_hub_id), chosen)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 1,
        threshold: float = 0.5,
        top_k: int = 100,
    ) -> list[Instances]:
        """The instances of each image whose score is above `threshold`, best first; image_id is the image's position.

        Raises:
            ImageError: an image can't be read.
        """
        several = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray, Mapping)) else images
        return list(self.stream(several, batch_size=batch_size, threshold=threshold, top_k=top_k))

    def stream(
        self, images: Iterable[ImageSource], *, batch_size: int = 1, threshold: float = 0.5, top_k: int = 100
    ) -> Iterator[Instances]:
        """The same for any number of images, `batch_size` of them in memory at a time."""
        numbered = enumerate(images)
        while batch := list(islice(numbered, batch_size)):
            for found in self._predict(batch, top_k):
                yield found.above(threshold)

    @torch.inference_mode()
    def _predict(self, batch: Sequence[tuple[int, ImageSource]], top_k: int) -> list[Instances]:
        """The instances of some images with their positions, as many as `top_k` an image."""
        prepared = [self._transform.prepare(image, _name(position, image)) for position, image in batch]
        pixel_values = torch.stack([pixels for pixels, _, _ in prepared])  # uint8 (B, 3, H, W)
        pixel_mask = torch.stack([valid for _, valid, _ in prepared])  # bool (B, H, W)
        device = self.model.device
        output = self.model(pixel_values=pixel_values.to(device), pixel_mask=pixel_mask.to(device))
        return to_instances(
            output.class_queries_logits,
            output.masks_queries_logits,
            image_ids=[position for position, _ in batch],
            original_sizes=[frames.original for _, _, frames in prepared],
            resized_sizes=[frames.resized for _, _, frames in prepared],
            padded_size=self.padded_size,
            category_ids=self.category_ids,
            top_k=top_k,
        )


def _name(position: int, image: ImageSource) -> str:
    """An image's name in messages."""
    return str(image) if isinstance(image, (str, Path)) else f"image {position}"
