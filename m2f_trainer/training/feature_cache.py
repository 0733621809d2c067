"""Feature maps of a frozen backbone, computed once for a fixed set of views of each image and then read from disk.

View k of an image is its augmentation in epoch k, a function of (seed, k, index); with K views, epoch e trains on view
e mod K. A step then only runs neck and head, and reads pixels and masks as they were made for the view: decoding and
cropping take up to a tenth of such a step on a CPU. In return, training uses only K views of an image instead of a new
one in each epoch, the maps are rounded to bfloat16, and the files take disk space.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from m2f_trainer.config.bfloat16 import cpu_is_faster_in_bf16
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.data.files import file_state
from m2f_trainer.data.imbalance import RepeatedSamples
from m2f_trainer.data.packed_samples import pack_sample, unpack_sample
from m2f_trainer.data.reading import reading_of
from m2f_trainer.distributed import from_main, rank_and_world_size, warn_on_main
from m2f_trainer.errors import DataError, RecipeError
from m2f_trainer.masks.rle import Size
from m2f_trainer.model.encoder import Encoder
from m2f_trainer.model.mask2former import M2FModel, backbone_of
from m2f_trainer.run_folder import FEATURE_CACHE, read_json, write_json
from m2f_trainer.training.callbacks.progress import print_line
from m2f_trainer.training.checkpointing.fingerprint import annotations_digest

logger = logging.getLogger(__name__)
Record: TypeAlias = tuple[Sequence[Tensor], bytes]
"""The maps of a view, (C, h, w) each, and its packed sample."""

KEY = "maps.json"
"""The file that names the maps' files and what they were computed from; written last."""

FORMAT = 2
"""Version of the files: 1 had no samples."""

SPARE = 0.02  # fraction of the disk that is left free
PIXELS_AT_ONCE = 2**18  # of small images, such as 16 of 128 x 128
FIRST_LINE, OTHER_LINES = 5.0, 60.0
"""Seconds after which the progress of the computation is first printed, and between the other lines."""
SHARE_OF_RUN = 0.5
"""Largest share of max_minutes that the computation may take."""
MEASURED = 0.25  # of that share: time of the measurement, at most `FIRST_LINE`


@dataclass(frozen=True)
class MapFiles:
    """Samples of N images x K views and their feature maps in bfloat16, one record per view after another.

    Each rank writes two files of its own, of maps and of samples, and renames them when they are complete. Nodes that
    share a network file system (NFS) must not write one file together: they would overwrite each other's parts of a
    page. A file of samples ends with the places where they begin, and the last one ends: int64 (rows + 1,).

    Attributes:
        folder: where the files are.
        name: what their names begin with, new for each computation: a node may still know a former file by its name.
        images, views: N and K.
        shapes: (C, h, w) of each map of a record; the maps of a record lie one after another.
        frame: (H, W) of the samples.
        parts: number of files; record r is row r // parts of file r % parts.
    """

    folder: Path
    name: str
    images: int
    views: int
    shapes: tuple[tuple[int, int, int], ...]
    frame: Size
    parts: int

    @property
    def numbers(self) -> int:
        """Values per record."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Size of all files of maps in bytes."""
        return 2 * self.images * self.views * self.numbers

    @property
    def view_size(self) -> int:
        """Size of a record in bytes, without the bitmaps of its masks, which are small."""
        return 2 * self.numbers + 3 * math.prod(self.frame)

    def path(self, part: int) -> Path:
        """The file of a rank's maps."""
        return self.folder / f"{self.name}-{part}.bf16"

    def samples_path(self, part: int) -> Path:
        """The file of a rank's samples."""
        return self.folder / f"{self.name}-{part}.samples"

    def write(self, part: int, records: Iterable[Record]) -> None:
        """Write the records of one rank in order.

        The maps are rounded to bfloat16.

        Raises:
            DataError: a file can't be written.
        """
        paths = self.path(part), self.samples_path(part)
        unfinished = [path.with_name(f".{path.name}") for path in paths]
        try:
            with unfinished[0].open("wb") as of_maps, unfinished[1].open("wb") as of_samples:
                starts = [0]
                for maps, packed in records:
                    flat = torch.cat([one.flatten() for one in maps]).to("cpu", torch.bfloat16)
                    of_maps.write(flat.view(torch.int16).numpy().tobytes())
                    of_samples.write(packed)
                    starts.append(of_samples.tell())
                of_samples.write(np.array(starts, np.int64).tobytes())
                for file in (of_maps, of_samples):
                    file.flush()
                    os.fsync(file.fileno())
            for source, path in zip(unfinished, paths, strict=True):
                source.replace(path)
        except OSError as error:
            raise DataError(
                f"feature_cache: {paths[0]} can't be written ({error}). Set output_dir to a larger disk, or "
                "feature_cache to 0."
            ) from error
        finally:
            for path in unfinished:
                path.unlink(missing_ok=True)

    def read(self, record: int) -> list[Tensor]:
        """The maps of one record, bfloat16 (C, h, w) each."""
        part, row = record % self.parts, record // self.parts
        shape = (self.rows(part), self.numbers)
        values = np.memmap(self.path(part), np.uint16, "r", shape=shape)[row]  # numpy has no bfloat16
        flat = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
        sizes = [math.prod(shape) for shape in self.shapes]
        return [one.view(shape) for one, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    def read_sample(self, record: int) -> dict[str, Any]:
        """The sample of one record, without its maps."""
        part, row = record % self.parts, record // self.parts
        with self.samples_path(part).open("rb") as file:
            file.seek(8 * (row - self.rows(part) - 1), os.SEEK_END)
            start, end = np.frombuffer(file.read(16), np.int64).tolist()
            file.seek(start)
            return unpack_sample(file.read(end - start))

    def rows(self, part: int) -> int:
        """The number of records of a rank."""
        return len(range(part, self.images * self.views, self.parts))


class CachedViews(InstanceDataset):
    """K fixed views of each sample, and the backbone's feature maps of them, from files: epoch e has view e mod K."""

    def __init__(self, dataset: InstanceDataset, maps: MapFiles) -> None:
        super().__init__(dataset.rows, dataset.transform, dataset.categories)
        self.dataset, self.maps = dataset, maps

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int, epoch: int) -> Mapping[str, Any]:
        """The row of the view."""
        return self.dataset.row(index, epoch % self.maps.views)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """As `InstanceDataset`, with `backbone_maps`, (C, h, w) each."""
        record = index * self.maps.views + epoch % self.maps.views
        return {**self.maps.read_sample(record), "backbone_maps": self.maps.read(record)}

    def images(self, epoch: int) -> NDArray[np.int64]:
        """As `InstanceDataset`."""
        return self.dataset.images(epoch % self.maps.views)

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

    `args` are the run's training arguments. The work is divided among the ranks, which may be on several nodes that
    share the run's folder.

    Raises:
        DataError: the disk is full
        RecipeError: the work would take more than half of the run's max_minutes
    """
    transform: Any = dataset.transform
    folder = Path(str(args.output_dir), FEATURE_CACHE)
    cast(nn.Module, model).to(args.device)
    shapes = map_shapes(model.encoder, transform.size)
    rank, world = rank_and_world_size()
    key = {
        "format": FORMAT, "shapes": [list(shape) for shape in shapes], "views": views, "of": cache_key(dataset, model)
    }  # fmt: skip
    report_unseen_tiles(dataset, views)
    found = from_main(partial(stored_files, folder, key))
    name, parts = found or (from_main(lambda: f"maps-{uuid.uuid4().hex[:8]}"), world)
    maps = MapFiles(folder, name, len(dataset), views, shapes, transform.size, parts)
    if found is None:
        from_main(partial(make_room, maps))
        computed = compute_maps(dataset, model, maps, args)
        if rank == 0:
            computed = with_progress(within_minutes(computed, maps, args.max_minutes), maps.rows(0))
        maps.write(rank, computed)
        PartialState().wait_for_everyone()
        from_main(partial(write_json, folder / KEY, {**key, "name": name, "parts": parts}))
        from_main(partial(remove_others, folder, name))
    return CachedViews(dataset, maps)


def stored_files(folder: Path, key: Mapping[str, Any]) -> tuple[str, int] | None:
    """`name` and `parts` of the `MapFiles` in a folder, if they are complete and have this key; None otherwise."""
    found = read_json(folder / KEY)
    return (found["name"], found["parts"]) if key.items() <= found.items() else None


@torch.no_grad()
def map_shapes(encoder: Encoder, size: Size) -> tuple[tuple[int, int, int], ...]:
    """(C, h, w) of each of the backbone's maps for images of `size` (height, width)."""
    encoder.eval()
    device = next(encoder.parameters()).device
    found = encoder.backbone_features(torch.zeros(1, 3, *size, device=device))
    return tuple((one.shape[1], one.shape[2], one.shape[3]) for one in found)


def cache_key(dataset: InstanceDataset, model: M2FModel) -> str:
    """SHA-256 of everything the files depend on: backbone, pixel values, annotations, classes and augmentation."""
    total = hashlib.sha256(backbone_of(model.config).to_json_string(use_diff=False).encode())
    for name, tensor in model.encoder.backbone.state_dict().items():
        total.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    settings = {name: str(value) for name, value in sorted(vars(dataset.transform).items())}
    repeated = dataset.threshold if isinstance(dataset, RepeatedSamples) else None
    pixels = [list(model.config.image_mean), list(model.config.image_std), reading_of(dataset.rows[0]).columns()]
    contents = [annotations_digest(dataset.rows), images_digest(dataset.rows), list(dataset.class_of)]
    total.update(json.dumps([settings, len(dataset), repeated, pixels, contents]).encode())
    return total.hexdigest()


def images_digest(rows: datasets.Dataset) -> str:
    """SHA-256 of the size and modification time of each image's file; of the size alone for images inside the rows."""
    total = hashlib.sha256()
    for table in rows.select_columns(["image"]).with_format("arrow").iter(batch_size=100):
        for chunk in table["image"].chunks:
            sizes = pc.binary_length(chunk.field("bytes")).to_pylist()
            for size, path in zip(sizes, chunk.field("path").to_pylist(), strict=True):
                total.update(repr(file_state(path) if size is None else size).encode())
    return total.hexdigest()


def report_unseen_tiles(dataset: InstanceDataset, views: int) -> None:
    """Log how many of the tiles that are cycled through over the epochs are in none of the views."""
    tiles = dataset.dataset if isinstance(dataset, RepeatedSamples) else dataset
    total = np.count_nonzero(tiles.shares())
    seen = len(np.unique(np.concatenate([tiles.units(view) for view in range(views)])))
    if seen < total:
        warn_on_main(
            logger,
            "feature_cache %s: %s of %s tiles are never trained on, because the tiles of the first %s epochs are used "
            "in all of them. Raise feature_cache or tiles_per_image.",
            views, f"{total - seen:,}", f"{total:,}", views,
        )  # fmt: skip


def make_room(maps: MapFiles) -> None:
    """Log the size of new maps. Former ones are removed now only where the disk has no room for both.

    Raises:
        DataError: the disk has no room for the new ones
    """
    maps.folder.mkdir(parents=True, exist_ok=True)
    remove_others(maps.folder, read_json(maps.folder / KEY).get("name"))
    needed = maps.images * maps.views * maps.view_size
    if needed > free_bytes(maps.folder):
        shutil.rmtree(maps.folder)
        maps.folder.mkdir()
    room = free_bytes(maps.folder)
    size = f"{maps.images} images x {maps.views} views x {maps.view_size / 1e6:.3g} MB = {needed / 1e9:.3g} GB"
    if needed > room:
        raise DataError(
            f"feature_cache {maps.views}: {size} of backbone maps and pixels do not fit into {maps.folder}, where "
            f"{room / 1e9:.2f} GB can be used. Lower feature_cache, image_height and image_width; or set output_dir to "
            "a larger disk, or feature_cache to 0"
        )
    logger.warning(
        "feature_cache: %s of backbone maps and pixels go to %s (%.1f GB can be used)", size, maps.folder, room / 1e9
    )


def free_bytes(folder: Path) -> int:
    """The bytes of a folder's disk that can be used."""
    disk = shutil.disk_usage(folder)
    return disk.free - int(SPARE * disk.total)


def remove_others(folder: Path, name: str | None) -> None:
    """Remove all maps except those of this name: former ones, and the rest of computations that were killed."""
    for path in folder.iterdir():
        if path.name != KEY and not (name and path.name.startswith(f"{name}-")):
            path.unlink()


@torch.no_grad()
def compute_maps(dataset: InstanceDataset, model: M2FModel, maps: MapFiles, args: TrainArguments) -> Iterator[Record]:
    """Run the backbone over this rank's share of all views; yield the maps of each, (C, h, w) each, and its sample.

    Small images are batched together.
    """
    rank, _ = rank_and_world_size()
    todo = AllViews(dataset, maps.views, slice(rank, None, maps.parts))
    transform: Any = dataset.transform
    batch_size = max(args.per_device_train_batch_size, PIXELS_AT_ONCE // math.prod(transform.size))
    workers = args.dataloader_num_workers
    loader: DataLoader[Any] = DataLoader(todo, batch_size, num_workers=workers, collate_fn=_pack_and_collate)
    for packed, batch in loader:
        found = features(model, batch["pixel_values"].to(args.device), batch["pixel_mask"].to(args.device), args)
        for maps_of_one, sample in zip(zip(*found, strict=True), packed, strict=True):
            yield list(maps_of_one), sample


@torch.no_grad()
def features(model: M2FModel, pixels: Tensor, mask: Tensor, args: TrainArguments) -> Sequence[Tensor]:
    """The backbone's maps (B, C, h, w) of images uint8 (B, 3, H, W) with pixel mask (B, H, W), all on the run's device.

    In bfloat16, the type of the files, if the recipe has bf16 or the CPU is faster in it.
    """
    half = bool(args.bf16) or (args.device.type == "cpu" and cpu_is_faster_in_bf16())
    with torch.autocast(args.device.type, torch.bfloat16, enabled=half):
        return model.encoder.backbone_features(model.normalise(pixels, mask))


def _pack_and_collate(samples: Sequence[Mapping[str, Any]]) -> tuple[list[bytes], dict[str, Any]]:
    return [pack_sample(one) for one in samples], collate(samples)


def within_minutes(
    records: Iterable[Record], maps: MapFiles, minutes: float | None, now: Callable[[], float] = time.monotonic
) -> Iterator[Record]:
    """Yield the records of the main rank; measure some of them, and end the run if all take too much of `max_minutes`.

    The measurement begins after the first batch, which waits for data workers to start. `now` is the clock of `Clock`.

    Raises:
        RecipeError: as `require_minutes`
    """
    if minutes is None:
        yield from records
        return
    least = min(MEASURED * SHARE_OF_RUN * 60 * minutes, FIRST_LINE)
    begun, is_measured = math.inf, False
    for done, record in enumerate(records):
        yield record
        begun = min(begun, now())
        passed = now() - begun
        if done and passed >= least and not is_measured:
            require_minutes(maps, passed / done, minutes)
            is_measured = True


def require_minutes(maps: MapFiles, each: float, minutes: float) -> None:
    """Raise RecipeError if all views, at `each` seconds on the main rank, take more than `SHARE_OF_RUN` of the minutes.

    A resumed run is compared with all its minutes, not with those that are left: it may have to compute views again.
    """
    limit, needed = 60 * minutes * SHARE_OF_RUN, each * maps.rows(0)
    if needed > limit:
        fitting, longer = int(maps.views * limit / needed), math.ceil(needed / SHARE_OF_RUN / 6) / 10
        raise RecipeError(
            f"feature_cache {maps.views}: expected that the features of {maps.images:,} images x {maps.views} views "
            f"are computed in at most half of max_minutes, which is {minutes:g}. They would take {needed / 60:.1f} "
            f"minutes, by the {each:.2g} s/view of the first ones. Set feature_cache to "
            f"{f'{fitting} or 0' if fitting else '0'}, or max_minutes to {longer:g} or more."
        )


def with_progress(records: Iterable[Record], total: int) -> Iterator[Record]:
    """Yield the records of one rank; print how many are done, the mean time of one and the time left now and then."""
    begun = time.perf_counter()
    due = begun + FIRST_LINE
    for done, record in enumerate(records, 1):
        yield record
        now = time.perf_counter()
        if now >= due:
            each = (now - begun) / done
            left = tqdm.format_interval(each * (total - done))
            print_line(f"feature_cache: {done:,} of {total:,} views, {each:.2f} s/view, {left} left")
            due = now + OTHER_LINES
