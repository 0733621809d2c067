"""Predict instances at the original size from images of any kind: preprocessing, model and postprocessing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from m2f_trainer.config.bfloat16 import gpu_computes_in_bf16
from m2f_trainer.data.geometry import Frames
from m2f_trainer.data.image_names import is_address
from m2f_trainer.data.images import ImageSource
from m2f_trainer.data.reading import model_range
from m2f_trainer.data.tiles import tiling_of
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.errors import ArgumentError, DataError, ImageError, M2FError, MissingPackageError, check_model_path
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.postprocess import most_instances, to_instances
from m2f_trainer.inference.tiles import CANDIDATES, Merger
from m2f_trainer.inference.windows import windows_of
from m2f_trainer.masks.rle import Size
from m2f_trainer.model.mask2former import M2FModel, load_model

PredictorInput: TypeAlias = ImageSource | bytearray | memoryview | BinaryIO | Tensor
"""What `Predictor` takes as an image."""

_SINGLE = (str, Path, bytes, bytearray, memoryview, Image.Image, Mapping)
_EXPECTED = "a path, bytes, a binary file object, a Pillow image, an array or a tensor"

Precision: TypeAlias = Literal["auto", "float32", "bf16"]
"""Arithmetic of the model: float32, or bfloat16 autocast, which GPUs since Ampere compute several times faster."""

DEFAULT_THRESHOLD = 0.5
"""The score threshold of a model without its own."""


class Predictor:
    """Predict as evaluation does, for images without annotations: `Predictor(model)(images)`.

    A model that was trained on tiles predicts in tiles; set `tiling` to change them, or to None for whole images.
    Images of more than 8 bits are scaled by the `pixel_range` of the model's training, which can be set, too.

    Args:
        model: a model of this package; it is set to evaluation mode and, if `device` is given, moved there.
        device: "cuda", "cuda:1", "cpu", ...; by default the model stays on its device.
        precision: "float32" or "bf16" (autocast: weights stay in float32); "auto" is bf16 on GPUs that have it.

    Raises:
        ArgumentError: the precision is unknown, the GPU has no bfloat16 units, or there is no such device.

    >>> from m2f_trainer import Predictor, build_model
    >>> vit = {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = build_model(vit, [{"id": 3, "name": "cat"}], image_size=(64, 64), num_queries=5)  # random weights
    >>> (found,) = Predictor(model)(np.zeros((40, 60, 3), np.uint8), threshold=0.0)
    >>> found.size, set(found.category_ids.tolist()) <= {3}
    ((40, 60), True)
    """

    def __init__(
        self, model: M2FModel, device: str | torch.device | None = None, precision: Precision = "auto"
    ) -> None:
        if isinstance(model, str | Path):
            raise ArgumentError(f"Predictor: expected a model, got {str(model)!r}. Use Predictor.from_pretrained.")
        self.model = model
        self.model.train(False)
        if device is not None:
            self.model.to(usable_device(device))  # type: ignore[arg-type]  # transformers hides torch's signature
        self.bf16 = uses_bf16(precision, model.device)
        categories = model.config.categories or []
        self.category_ids = [int(category["id"]) for category in categories]
        self.names = {int(category["id"]): str(category["name"]) for category in categories}
        self.padded_size = (model.config.image_height, model.config.image_width)
        self.tiling = tiling_of(model.config)
        self.pixel_range = model_range(model.config.pixel_range)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str, device: str | torch.device | None = None, precision: Precision = "auto"
    ) -> Predictor:
        """Load a model folder or a Hub id; on `device`, by default a GPU if there is one.

        Raises:
            ModelError: the folder or id doesn't contain a model of this package.
            ModelFolderError: there is no such folder.
        """
        check_model_path(folder_or_hub_id)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model(folder_or_hub_id), chosen, precision)

    def __call__(
        self,
        images: PredictorInput | Iterable[PredictorInput],
        *,
        batch_size: int = 1,
        threshold: float | Literal["auto"] = "auto",
        top_k: int | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> list[Instances]:
        """The instances of each image whose score is above `threshold`, best first.

        `image_ids` are those of the results, such as `rows["image_id"]` of a dataset to score against with `CocoMap`;
        by default they are the positions of the images. `batch_size` and `top_k` are as in `stream`; with `top_k=100`
        and `threshold=0.0`, the figures of `CocoMap` are those of an evaluation.

        An image is a path, the bytes of a file, a binary file object, a Pillow image, an array (H, W) or (H, W, C), or
        a tensor (H, W) or (C, H, W). An array or tensor with four axes is a batch of images.
        "auto" uses the best threshold of each class on the validation images, which trained models store, or 0.5.
        Instances of tiles are merged first: an object in several tiles is compared with the threshold as a whole.

        Raises:
            ImageError: an image can't be read.
            ArgumentError: an argument has the wrong type.
        """
        found = list(self.stream(images_of(images), batch_size=batch_size, threshold=threshold, top_k=top_k))
        if image_ids is None:
            return found
        if len(image_ids) != len(found):
            raise ArgumentError(f"image_ids: expected one for each of {len(found)} images, got {len(image_ids)}.")
        return [replace(one, image_id=int(key)) for one, key in zip(found, image_ids, strict=True)]

    def stream(
        self,
        images: Iterable[PredictorInput | Frame],
        *,
        batch_size: int = 1,
        threshold: float | Literal["auto"] = "auto",
        top_k: int | None = None,
        unreadable: Callable[[int, M2FError], object] | None = None,
    ) -> Iterator[Instances]:
        """The same as an iterator over any number of images; `batch_size` images, or tiles, are in memory at a time.

        `top_k` limits the instances per image, or per tile; by default it is the number of queries, at least 100.
        `unreadable` is called with the position and the error of each image that can't be read, which has no instances
        then; by default the error is raised. An image may also be given as its `whole_frame`.
        """
        if isinstance(images, _SINGLE):
            raise ArgumentError(f"images: expected several images, got one ({type(images).__name__}). Give a list.")
        if threshold != "auto" and (isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number))):
            raise ArgumentError(f'threshold: expected a number or "auto", got {threshold!r}.')
        if threshold != "auto" and not threshold <= 1:  # nor NaN; below zero, empty masks are returned, too
            raise ArgumentError(
                f'threshold: expected a score of at most 1, or "auto", got {threshold!r}. 0.5 stands for 50%.'
            )
        top_k = most_instances(self.model.config.num_queries) if top_k is None else top_k
        for name, value in (("batch_size", batch_size), ("top_k", top_k)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ArgumentError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        return self._stream(images, batch_size, threshold, top_k, unreadable)

    def _stream(
        self,
        images: Iterable[PredictorInput | Frame],
        batch_size: int,
        threshold: float | Literal["auto"],
        top_k: int,
        unreadable: Callable[[int, M2FError], object] | None,
    ) -> Iterator[Instances]:
        lowest = self.thresholds() if threshold == "auto" else dict.fromkeys(self.category_ids, threshold)
        frames, merger = self.frames(images, unreadable), Merger(self.tiling) if self.tiling else None
        least = min(lowest.values())
        least = min(least, CANDIDATES) if merger else least
        while batch := list(islice(frames, batch_size)):
            for frame, instances in zip(batch, self._predict(batch, least, top_k), strict=True):
                whole = merger.add(instances, frame.tile, frame.size) if merger else instances
                if whole is not None:
                    yield replace(whole.above(lowest), pixel_range=self.pixel_range)

    def thresholds(self) -> dict[int, float]:
        """Category id -> the threshold of the highest F1 on the validation images; 0.5 if the model stores none."""
        stored = self.model.config.thresholds or [DEFAULT_THRESHOLD] * len(self.category_ids)
        return dict(zip(self.category_ids, stored, strict=True))

    def frames(
        self,
        images: Iterable[PredictorInput | Frame],
        unreadable: Callable[[int, M2FError], object] | None = None,
    ) -> Iterator[Frame]:
        """The model's input for each image: the whole image, or its tiles in order."""
        for position, image in enumerate(images):
            if isinstance(image, Frame):
                yield replace(image, position=position)
                continue
            try:
                yield from self._frames_of(position, source_of(image, f"image {position}"))
            except (DataError, MissingPackageError) as error:
                if unreadable is None:
                    raise
                unreadable(position, error)

    def _frames_of(self, position: int, image: ImageSource) -> Iterator[Frame]:
        where = str(image) if isinstance(image, (str, Path)) else f"image {position}"
        if self.tiling is None:
            yield self.whole_frame(image, where, position)
            return
        windows = windows_of(image, where, self.pixel_range)
        for number, tile in enumerate(self.tiling.lay(windows.size)):
            yield Frame(position, windows.size, number, *self.tiling.prepare(windows.read(tile.box)))

    def whole_frame(self, image: ImageSource, where: str = "image", position: int = 0) -> Frame:
        """The model's input for a whole image, which `stream` takes in its place; threads may call this at any time.

        Raises:
            ImageError: the image can't be read; `where` names it.
            ArgumentError: the predictor cuts images into tiles.
        """
        if self.tiling is not None:
            raise ArgumentError("whole_frame: this predictor cuts images into tiles. Set its tiling to None.")
        transform = EvalTransform(*self.padded_size, self.pixel_range)
        values, valid, frames = transform.prepare(image, where)
        return Frame(position, frames.original, 0, values, valid, frames)

    @torch.inference_mode()
    def _predict(self, batch: Sequence[Frame], threshold: float, top_k: int) -> list[Instances]:
        """The instances of each frame, at most `top_k`, at the frame's original size."""
        pixel_values = torch.stack([frame.pixel_values for frame in batch])  # uint8 (B, 3, H, W)
        pixel_mask = torch.stack([frame.pixel_mask for frame in batch])  # bool (B, H, W)
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(pixel_values=pixel_values.to(device), pixel_mask=pixel_mask.to(device))
        return to_instances(
            output.class_queries_logits.float(),
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


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name. Raises ArgumentError if torch knows none, or this machine has none, of that name."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ArgumentError(f"device: {str(name)!r} can't be used here ({error}). Use cpu.") from error
    return device


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast on a device.

    Raises:
        ArgumentError: the precision is unknown, or the GPU has no bfloat16 units.
    """
    if precision not in get_args(Precision):
        raise ArgumentError(f"precision: expected {', '.join(get_args(Precision))}, got {precision!r}.")
    if precision == "bf16" and device.type == "cuda" and not gpu_computes_in_bf16():
        raise ArgumentError("precision bf16: this GPU has no bfloat16 units. Use float32.")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and gpu_computes_in_bf16())


def images_of(images: PredictorInput | Iterable[PredictorInput]) -> Iterable[PredictorInput]:
    """The images as an iterable, also for a single one.

    Raises:
        ArgumentError: it is neither
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, _SINGLE) or _is_file(images):
        return [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable):
        raise ArgumentError(f"images: expected {_EXPECTED}, or several of them, got {type(images).__name__}.")
    return images


def source_of(image: PredictorInput, where: str) -> ImageSource:
    """An image in a form that `open_image` reads.

    Raises:
        ArgumentError: it is of another type
        ImageError: a file object can't be read
    """
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        array: npt.NDArray[Any] = values.numpy()
        return np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] in (1, 3, 4) else array
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, str) and is_address(image):
        raise ArgumentError(f"{where}: {image} is an address, which is not read. Download the image first.")
    if isinstance(image, (str, Path, bytes, Image.Image, Mapping, np.ndarray)):
        return image
    if _is_file(image):
        try:
            content = image.read()
        except (OSError, ValueError) as error:
            remedy = "Open it again, in binary mode: open(path, 'rb')."
            raise ImageError(f"{where}: the file object can't be read ({error}). {remedy}") from error
        if isinstance(content, bytes):
            return content
        raise ArgumentError(f"{where}: expected a file that is opened in binary mode, as by open(path, 'rb').")
    raise ArgumentError(f"{where}: expected {_EXPECTED}, got {type(image).__name__}.")


def _is_file(image: object) -> bool:
    return isinstance(image, io.IOBase) or callable(getattr(image, "read", None))
