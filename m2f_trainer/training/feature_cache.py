"""Feature maps of a frozen backbone, computed once for a fixed set of views of each image and then read from disk.

View k of an image is its augmentation in epoch k, a function of (seed, k, index); with K views, epoch e trains on view
e mod K. A step then only runs neck and head. In return, training uses only K views of an image instead of a new one in
each epoch, the maps are rounded to bfloat16, and they take disk space.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2f_trainer.config.training_arguments import TrainArguments, cpu_computes_in_bf16
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.data.imbalance import RepeatedSamples
from m2f_trainer.errors import DataError
from m2f_trainer.masks.rle import Size
from m2f_trainer.model.encoder import Encoder
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.run_folder import FEATURE_CACHE, write_atomically
from m2f_trainer.training.checkpointing.fingerprint import annotations_digest

logger = logging.getLogger(__name__)
MAPS, KEY = "maps.bf16", "maps.json"
SPARE = 0.02  # fraction of the disk that is left free
PIXELS_AT_ONCE = 2**18  # of small images, such as 16 of 128 x 128


@dataclass(frozen=True)
class MapFile:
    """Feature maps of N images x K views in bfloat16, one record per view after another.

    shapes  (C, h, w) of each map of a record; the maps of a record lie one after another
    """

    path: Path
    images: int
    views: int
    shapes: tuple[tuple[int, int, int], ...]

    @property
    def numbers(self) -> int:
        """Values per record."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return 2 * self.images * self.views * self.numbers

    def table(self, mode: Literal["r", "r+", "w+"]) -> "np.memmap[tuple[int, int], np.dtype[np.uint16]]":
        """The file, memory-mapped as uint16 (N x K, numbers): numpy has no bfloat16."""
        return np.memmap(self.path, np.uint16, mode, shape=(self.images * self.views, self.numbers))

    def write(self, record: int, maps: Sequence[Tensor]) -> None:
        """Write the maps of one record, (C, h, w) each; `read` is the inverse up to rounding."""
        flat = torch.cat([one.flatten() for one in maps]).to("cpu", torch.bfloat16)
        self.table("r+")[record] = flat.view(torch.int16).numpy().view(np.uint16)

    def read(self, record: int) -> list[Tensor]:
        """The maps of one record, bfloat16 (C, h, w) each."""
        row = np.array(self.table("r")[record])
        flat = torch.from_numpy(row.view(np.int16)).view(torch.bfloat16)
        parts = flat.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class CachedViews(InstanceDataset):
    """K fixed views of each sample, with the backbone's feature maps from a file: epoch e has view e mod K."""

    def __init__(self, dataset: InstanceDataset, maps: MapFile) -> None:
        super().__init__(dataset.rows, dataset.transform, dataset.categories)
        self.dataset, self.maps = dataset, maps

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int, epoch: int) -> Mapping[str, Any]:
        """The row of the view."""
        return self.dataset.row(index, epoch % self.maps.views)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """As `InstanceDataset`, with `backbone_maps`, (C, h, w) each."""
        view = epoch % self.maps.views
        return {**self.dataset.sample(index, view), "backbone_maps": self.maps.read(index * self.maps.views + view)}

    def objects(self) -> NDArray[np.int64]:
        """As `InstanceDataset`."""
        return self.dataset.objects()


class AllViews(Dataset[dict[str, Any]]):
    """Every view of every image once, in the order of the file's records.

    The view is passed as an argument, not set as the dataset's epoch, which all data workers share.
    """

    def __init__(self, dataset: InstanceDataset, views: int, share: slice) -> None:
        self.dataset, self.views = dataset, views
        self.records = range(len(dataset) * views)[share]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index, view = divmod(self.records[place], self.views)
        return self.dataset.sample(index, view)


def with_cached_maps(dataset: InstanceDataset, model: M2FModel, views: int, args: TrainArguments) -> CachedViews:
    """The dataset with its backbone maps, which are computed and stored in the run's folder if they are absent.

    `args` are the run's training arguments. The work is divided among the ranks. Raises DataError if the disk is full.
    """
    transform: Any = dataset.transform
    folder, encoder = Path(str(args.output_dir), FEATURE_CACHE), model.encoder.to(args.device)
    shapes = map_shapes(encoder, transform.size)
    maps = MapFile(folder / MAPS, len(dataset), views, shapes)
    key = json.dumps({"shapes": shapes, "views": views, "of": cache_key(dataset, encoder)})
    state = PartialState()
    there = (folder / KEY).is_file() and (folder / KEY).read_text(encoding="utf-8") == key
    state.wait_for_everyone()
    if not there:
        if state.is_main_process:
            allocate(maps)
        state.wait_for_everyone()
        compute_maps(dataset, model, maps, args)
        state.wait_for_everyone()
        if state.is_main_process:
            write_atomically(folder / KEY, key)
    return CachedViews(dataset, maps)


@torch.no_grad()
def map_shapes(encoder: Encoder, size: Size) -> tuple[tuple[int, int, int], ...]:
    """(C, h, w) of each of the backbone's maps for images of `size` (height, width)."""
    encoder.eval()
    device = next(encoder.parameters()).device
    found = encoder.backbone_features(torch.zeros(1, 3, *size, device=device))
    return tuple((one.shape[1], one.shape[2], one.shape[3]) for one in found)


def cache_key(dataset: InstanceDataset, encoder: Encoder) -> str:
    """SHA-256 of everything the maps depend on: backbone weights, annotations and augmentation settings."""
    total = hashlib.sha256()
    for name, tensor in encoder.backbone.state_dict().items():
        total.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    settings = {name: str(value) for name, value in sorted(vars(dataset.transform).items())}
    repeated = dataset.threshold if isinstance(dataset, RepeatedSamples) else None
    total.update(json.dumps([settings, len(dataset), annotations_digest(dataset.rows), repeated]).encode())
    return total.hexdigest()


def allocate(maps: MapFile) -> None:
    """Log the size of the file and allocate it. Raises DataError if the disk has no room for it."""
    folder = maps.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).unlink(missing_ok=True)
    maps.path.unlink(missing_ok=True)
    disk = shutil.disk_usage(folder)
    room = disk.free - int(SPARE * disk.total)
    size = f"{maps.images} images x {maps.views} views x {2 * maps.numbers / 1e6:.3g} MB = {maps.size / 1e9:.3g} GB"
    if maps.size > room:
        raise DataError(
            f"feature_cache {maps.views}: {size} of backbone maps do not fit into {folder}, where {room / 1e9:.2f} GB "
            "can be used. Lower feature_cache, image_height and image_width; or set output_dir to a larger disk, or "
            "feature_cache to null"
        )
    logger.warning("feature_cache: %s of backbone maps go to %s (%.1f GB free)", size, maps.path, disk.free / 1e9)
    maps.table("w+").flush()


@torch.no_grad()
def compute_maps(dataset: InstanceDataset, model: M2FModel, maps: MapFile, args: TrainArguments) -> None:
    """Run the backbone over this rank's share of all views, and write the maps.

    In bfloat16, the type of the file, if the recipe has bf16 or the CPU supports it. Small images are batched together.
    """
    state = PartialState()
    todo = AllViews(dataset, maps.views, slice(state.process_index, None, state.num_processes))
    transform: Any = dataset.transform
    batch_size = max(args.per_device_train_batch_size, PIXELS_AT_ONCE // math.prod(transform.size))
    loader: DataLoader[Any] = DataLoader(todo, batch_size, num_workers=args.dataloader_num_workers, collate_fn=collate)
    records = iter(todo.records)
    half = bool(args.bf16) or (args.device.type == "cpu" and cpu_computes_in_bf16())
    for batch in loader:
        pixels = model.normalise(batch["pixel_values"].to(args.device), batch["pixel_mask"].to(args.device))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=half):
            found = model.encoder.backbone_features(pixels)
        for maps_of_one in zip(*found, strict=True):
            maps.write(next(records), maps_of_one)
