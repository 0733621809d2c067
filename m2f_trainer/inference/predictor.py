"""Predict instances at the original size from images of any kind: preprocessing, model and postprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f_trainer.data.geometry import Frames
from m2f_trainer.data.images import ImageSource
from m2f_trainer.data.reading import model_range
from m2f_trainer.data.tiles import tiling_of
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.errors import check_model_path
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.postprocess import to_instances
from m2f_trainer.inference.tiles import Merger
from m2f_trainer.inference.windows import windows_of
from m2f_trainer.masks.rle import Size
from m2f_trainer.model.mask2former import M2FModel, load_model

DEFAULT_THRESHOLD = 0.5
"""The score threshold of a model without its own."""


class Predictor:
    """Predict as evaluation does, for images without annotations: `Predictor(model)(images)`.

    A model that was trained on tiles predicts in tiles; set `tiling` to change them, or to None for whole images.
    Images of more than 8 bits are scaled by the `pixel_range` of the model's training, which can be set, too.

    Args:
        model: a model of this package; it is set to evaluation mode and, if `device` is given, moved there.
        device: "cuda", "cuda:1", "cpu", ...; by default the model stays on its device.

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
        self.tiling = tiling_of(model.config)
        self.pixel_range = model_range(model.config.pixel_range)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, device: str | torch.device | None = None) -> Predictor:
        """Load a model folder or a Hub id; on `device`, by default a GPU if there is one.

        Raises:
            ModelError: the folder or id doesn't contain a model of this package.
            ModelFolderError: there is no such folder.
        """
        check_model_path(folder_or_hub_id)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(folder_or_hub_id), chosen)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 1,
        threshold: float | Literal["auto"] = "auto",
        top_k: int = 100,
    ) -> list[Instances]:
        """The instances of each image whose score is above `threshold`, best first; image_id is the image's position.

        "auto" uses the best threshold of each class on the validation images, which trained models store, or 0.5.

        Raises:
            ImageError: an image can't be read.
        """
        several = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray, Mapping)) else images
        return list(self.stream(several, batch_size=batch_size, threshold=threshold, top_k=top_k))

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 1,
        threshold: float | Literal["auto"] = "auto",
        top_k: int = 100,
    ) -> Iterator[Instances]:
        """The same as an iterator over any number of images; `batch_size` images, or tiles, are in memory at a time.

        `top_k` limits the instances per image, or per tile.
        """
        lowest = self.thresholds() if threshold == "auto" else dict.fromkeys(self.category_ids, threshold)
        frames, merger = self._frames(images), Merger(self.tiling) if self.tiling else None
        while batch := list(islice(frames, batch_size)):
            for frame, instances in zip(batch, self._predict(batch, min(lowest.values()), top_k), strict=True):
                whole = merger.add(instances, frame.tile, frame.size) if merger else instances
                if whole is not None:
                    yield whole.above(lowest)

    def thresholds(self) -> dict[int, float]:
        """Category id -> the threshold of the highest F1 on the validation images; 0.5 if the model stores none."""
        stored = self.model.config.thresholds or [DEFAULT_THRESHOLD] * len(self.category_ids)
        return dict(zip(self.category_ids, stored, strict=True))

    def _frames(self, images: Iterable[ImageSource]) -> Iterator[Frame]:
        """The model's input for each image: the whole image, or its tiles in order."""
        for position, image in enumerate(images):
            if self.tiling is None:
                transform = EvalTransform(*self.padded_size, self.pixel_range)
                values, valid, frames = transform.prepare(image, _name(position, image))
                yield Frame(position, frames.original, 0, values, valid, frames)
                continue
            windows = windows_of(image, _name(position, image), self.pixel_range)
            for number, tile in enumerate(self.tiling.lay(windows.size)):
                yield Frame(position, windows.size, number, *self.tiling.prepare(windows.read(tile.box)))

    @torch.inference_mode()
    def _predict(self, batch: Sequence[Frame], threshold: float, top_k: int) -> list[Instances]:
        """The instances of each frame, at most `top_k`, at the frame's original size."""
        pixel_values = torch.stack([frame.pixel_values for frame in batch])  # uint8 (B, 3, H, W)
        pixel_mask = torch.stack([frame.pixel_mask for frame in batch])  # bool (B, H, W)
        device = self.model.device
        output = self.model(pixel_values=pixel_values.to(device), pixel_mask=pixel_mask.to(device))
        return to_instances(
            output.class_queries_logits,
            output.masks_queries_logits,
            image_ids=[frame.position for frame in batch],
            original_sizes=[frame.frames.original for frame in batch],
            resized_sizes=[frame.frames.resized for frame in batch],
            padded_size=self.padded_size,
            category_ids=self.category_ids,
            top_k=top_k,
            threshold=threshold,
        )


@dataclass(frozen=True, eq=False)
class Frame:
    """The model's input for one image or tile: pixel_values uint8 (3, H, W), pixel_mask bool (H, W).

    `position` and `size` (height, width) are the image's; `tile` is the tile's index in the image.
    """

    position: int
    size: Size
    tile: int
    pixel_values: Tensor
    pixel_mask: Tensor
    frames: Frames


def _name(position: int, image: ImageSource) -> str:
    """The name of an image in error messages."""
    return str(image) if isinstance(image, (str, Path)) else f"image {position}"
