"""`m2f predict`: images, folders, globs and videos -> pictures with instances drawn, COCO results and a CSV table."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from m2f_trainer.data.images import SUFFIXES
from m2f_trainer.data.tiles import Tiling
from m2f_trainer.errors import DataError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.inference.results import Record, keep, kept, record_of, write_dataset, write_results
from m2f_trainer.inference.video import VIDEOS, frame_rate, frames, write_video
from m2f_trainer.inference.windows import windows_of

logger = logging.getLogger(__name__)
PARTS, DRAWN = ".parts", ".instances"
LARGEST_PICTURE = 2**25
"""Pixels of an image that is still drawn on; a larger one gets no picture."""


@dataclass(frozen=True)
class Options:
    """How to predict. `tile` cuts images into tiles of that many pixels a side, which share `overlap` of it; 0 shows
    them whole. None of either: as the model was trained.
    """

    threshold: float = 0.5
    recursive: bool = False
    batch_size: int = 4
    tile: int | None = None
    overlap: float | None = None
    dataset: bool = False  # write the predictions as a COCO dataset too


def predict_folder(model: str, inputs: Sequence[Path], output_dir: Path, options: Options | None = None) -> Path:
    """Predict every image and video, write `<name>.instances.png` or `.mp4` of each; return the folder.

    predictions.json is in COCO results form, with the dataset's own category ids; `image_id` counts the images (and
    frames), and each result names its file too. predictions.csv holds the boxes. What was done before by the same model
    with the same options is not done again.

    Raises:
        DataError: an input isn't there, or there is no image in it
        ImageError: an image can't be read
        MissingPackageError: a video without PyAV, or a very large TIFF without tifffile
    """
    options = options or Options()
    paths = [path for given in inputs for path in images_of(given, options.recursive)]
    if not paths:
        raise DataError(
            f"no image found in {', '.join(map(str, inputs))} (looked for {', '.join((*SUFFIXES, *VIDEOS))}"
            f"{'' if options.recursive else '; --recursive looks into subfolders too'})"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    named = zip(paths, picture_names(paths), strict=True)
    jobs = [Job(path, output_dir, name, _key(model, path, options)) for path, name in named]
    predictor = Predictor.from_pretrained(model)
    predictor.tiling = tiling_for(predictor, options)
    left = [job for job in jobs if kept(job.part, job.key) is None]
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), disable=None) as bar:
        for _ in work(predictor, left, options):
            bar.update()
    records = [record for job in jobs for record in kept(job.part, job.key) or ()]
    if not any(record.instances for record in records):
        logger.warning("Nothing scored above %g: try a lower --threshold.", options.threshold)
    write_results(records, output_dir, predictor.names)
    if options.dataset:
        write_dataset(records, output_dir, predictor.names)
    return output_dir


@dataclass(frozen=True)
class Job:
    """One input file, the name of its picture, and what decides whether it was done."""

    path: Path
    folder: Path
    name: str
    key: tuple[object, ...]

    @property
    def part(self) -> Path:
        """Where its records are kept until all are done, and for the next time."""
        return self.folder / PARTS / f"{self.name}.json"


def _key(model: str, path: Path, options: Options) -> tuple[object, ...]:
    weights = Path(model, "model.safetensors")
    changed = [stat.st_mtime_ns for file in (weights, path) if file.is_file() and (stat := file.stat())]
    return (model, str(path), *changed, options.threshold, options.tile, options.overlap)


def tiling_for(predictor: Predictor, options: Options) -> Tiling | None:
    """The model's own tiles where the options name no others; None where images are shown whole."""
    own, config = predictor.tiling, predictor.model.config
    side = (own.side if own else 0) if options.tile is None else options.tile
    overlap = config.tile_overlap if options.overlap is None else options.overlap
    return Tiling(side, overlap, predictor.padded_size) if side else None


def work(predictor: Predictor, jobs: Sequence[Job], options: Options) -> Iterator[Job]:
    """Do the jobs, giving each when it is written: images, then videos."""
    images = [job for job in jobs if not is_video(job.path)]
    found = predictor.stream((job.path for job in images), batch_size=options.batch_size, threshold=options.threshold)
    for job, instances in zip(images, found, strict=True):
        _finish_image(job, instances, predictor)
        yield job
    for job in jobs:
        if is_video(job.path):
            _predict_video(job, predictor, options)
            yield job


def _finish_image(job: Job, instances: Instances, predictor: Predictor) -> None:
    height, width = instances.size
    if height * width <= LARGEST_PICTURE:
        pixels = windows_of(job.path, str(job.path)).read((0, 0, width, height))
        instances.overlay(Image.fromarray(pixels), predictor.names).save(job.folder / job.name)
    keep(job.part, job.key, [record_of(str(job.path), instances)])


def _predict_video(job: Job, predictor: Predictor, options: Options) -> None:
    seen, drawn = tee(frames(job.path))  # holds a batch of frames
    found = predictor.stream(seen, batch_size=options.batch_size, threshold=options.threshold)
    records: list[Record] = []

    def pictures() -> Iterator[Image.Image]:
        for number, (instances, frame) in enumerate(zip(found, drawn, strict=True)):
            records.append(record_of(f"{job.path}#{number}", instances))
            yield instances.overlay(frame, predictor.names, legend=False)  # frames of one size

    write_video(pictures(), job.folder / job.name, frame_rate(job.path))
    keep(job.part, job.key, records)


def is_video(path: Path) -> bool:
    """Told by the name."""
    return path.suffix.lower() in VIDEOS


def _is_input(path: Path) -> bool:
    """Whether a name is an image's or a video's, and not hidden (macOS leaves `._a.jpg`) or of a picture we drew."""
    named = path.suffix.lower() in (*SUFFIXES, *VIDEOS) and not path.name.startswith(".")
    return named and Path(path.stem).suffix != DRAWN and not path.is_dir()


def images_of(given: Path, recursive: bool) -> Iterator[Path]:
    """The image or video itself, or those of a folder or glob in the order of their names. Raises DataError."""
    if given.is_dir():
        inside = given.rglob("*") if recursive else given.iterdir()
        yield from sorted(path for path in inside if _is_input(path))
    elif given.is_file():
        yield given
    elif matching := sorted(glob.glob(str(given), recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute pattern)
        yield from (path for path in map(Path, matching) if _is_input(path))
    else:
        raise DataError(f"{given}: expected an image, a folder of images or a pattern, found nothing. Check the path.")


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture; images of one name in several folders are told apart by a number.

    It is never that of an image as it came: `output_dir` may be the images' own folder, or become a dataset's. Names
    that differ in case alone count as one: on Windows and macOS the second picture would replace the first.
    """
    names, seen = [], set()
    for path in paths:
        suffix = DRAWN + (".mp4" if is_video(path) else ".png")
        name, number = f"{path.stem}{suffix}", 1
        while name.lower() in seen:
            number += 1
            name = f"{path.stem}-{number}{suffix}"
        seen.add(name.lower())
        names.append(name)
    return names
