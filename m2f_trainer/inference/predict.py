"""`m2f predict`: predict images, folders, globs and videos; write overlays, COCO results and a CSV table."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import tee
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedConfig

from m2f_trainer.config.arguments import parse_pixel_range
from m2f_trainer.data.files import is_hidden
from m2f_trainer.data.images import HEIC_ADVICE, SUFFIXES
from m2f_trainer.data.problems import LISTED
from m2f_trainer.data.tiles import Tiling
from m2f_trainer.errors import DataError, ImageError, M2FError, MissingPackageError, RecipeError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Precision, Predictor
from m2f_trainer.inference.results import Record, load_records, record_of, save_records, write_dataset, write_results
from m2f_trainer.inference.tiles import CANDIDATES
from m2f_trainer.inference.video import VIDEOS, frame_rate, frames, write_video
from m2f_trainer.inference.windows import windows_of
from m2f_trainer.masks.rle import max_pixels
from m2f_trainer.viz.overlay import save_image

logger = logging.getLogger(__name__)
PARTS, DRAWN = ".parts", ".instances"
LARGEST_PICTURE = 2**25
"""Larger images, in pixels, get no overlay."""

LONGEST_STEM = 200
"""Bytes of an input's name in the names of its files; file systems allow 255, with suffixes and a temporary part."""


@dataclass(frozen=True)
class PredictOptions:
    """How to predict.

    threshold  minimum score of an instance; "auto": the model's own for each class
    tile       side of the tiles in pixels, 0 for whole images; None: as in the model's training
    overlap    fraction of a side that neighbouring tiles share; None: as in the model's training
    pixel_range  the recipe field; None: the model's own
    dataset    also write the predictions as a COCO dataset; not of videos
    precision  arithmetic of the model, as of `Predictor`
    """

    threshold: float | Literal["auto"] = "auto"
    recursive: bool = False
    batch_size: int = 4
    tile: int | None = None
    overlap: float | None = None
    pixel_range: str | None = None
    dataset: bool = False
    precision: Precision = "auto"


def predict_folder(model: str, inputs: Sequence[Path], output_dir: Path, options: PredictOptions | None = None) -> Path:
    """Predict every image and video, write `<name>.instances.png` or `.mp4` for each; return the folder.

    An input that is named more than once is predicted once.
    If inputs can't be read, the others are predicted first, then an error lists those that failed.

    predictions.json is in COCO results form, with the dataset's own category ids; `image_id` counts the images (and
    frames), and each result also has its `file_name`. predictions.csv holds the boxes. Inputs that were predicted
    before by the same model with the same options are not predicted again.

    Raises:
        DataError: an input doesn't exist or contains no image
        RecipeError: a tile has more pixels than an image may have, or a dataset is to be written of a video
        ImageError: inputs can't be read; the others were predicted; the message names each with its reason
    """
    options = options or PredictOptions()
    passed_over: Counter[str] = Counter()
    named = [path for source in inputs for path in find_inputs(source, options.recursive, passed_over)]
    paths = _without_repeats(named)
    left_aside = describe_passed_over(passed_over)
    if not paths:
        where = ", ".join(map(str, inputs))
        advice = "" if options.recursive else " --recursive searches subfolders too."
        raise DataError(f"{where}: expected images or videos, found none{left_aside and f' ({left_aside})'}.{advice}")
    if left_aside:
        logger.warning("Passed over: %s.", left_aside)
    if repeats := len(named) - len(paths):
        logger.warning("%d repeated input(s) left out: each is predicted once.", repeats)
    videos = [path for path in paths if is_video(path)]
    if options.dataset and videos:
        raise RecipeError(
            f"{videos[0]}: --format coco_dataset takes image files, got {len(videos)} video(s), whose frames have none."
            " Save the frames first, as by `ffmpeg -i VIDEO FOLDER/%06d.png`, and predict that folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    predictor = Predictor.from_pretrained(model, precision=options.precision)
    version = model_version(model, predictor.model.config)
    jobs = [
        Job(path, output_dir, name, _job_key(version, path, options))
        for path, name in zip(paths, picture_names(paths), strict=True)
    ]
    predictor.tiling = tiling_for(predictor, options)
    chosen = parse_pixel_range(options.pixel_range or "auto")
    predictor.pixel_range = predictor.pixel_range if chosen == "auto" else chosen
    left = [job for job in jobs if job.records() is None]
    failed: dict[Path, M2FError] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), disable=None) as bar:
        for job, error in run_jobs(predictor, left, options):
            bar.update()
            if error is not None:
                failed[job.path] = error
    finished = [(job, record) for job in jobs for record in job.records() or ()]
    records = [record for _, record in finished]
    if undrawn := sum(not job.draws(record) for job, record in finished):
        limit = f"{LARGEST_PICTURE:,}"
        logger.warning(
            "No overlay of %d image(s) of more than %s pixels; their predictions are written.", undrawn, limit
        )
    if records and not any(record.instances for record in records):
        lowest = min(predictor.thresholds().values()) if options.threshold == "auto" else options.threshold
        logger.warning("Nothing scored above %g: try a lower --threshold.", lowest)
    write_results(records, output_dir, predictor.names)
    if options.dataset:
        write_dataset(records, output_dir, predictor.names)
    if failed:
        raise ImageError(_failures(failed, len(jobs), output_dir))
    return output_dir


def _failures(failed: Mapping[Path, M2FError], total: int, folder: Path) -> str:
    """The message about inputs that can't be read."""
    lines = [str(error) if str(path) in str(error) else f"{path}: {error}" for path, error in failed.items()]
    shown = "\n  ".join(lines[:LISTED]) + (f"\n  ... and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
    done = total - len(failed)
    rest = f"; the predictions of the other {done} are in {folder}" if done else ""
    return f"{len(failed)} of {total} inputs can't be read{rest}:\n  {shown}"


@dataclass(frozen=True)
class Job:
    """One input file, the name of its overlay, and the key that identifies finished work."""

    path: Path
    folder: Path
    name: str
    key: tuple[object, ...]

    @property
    def part(self) -> Path:
        """The file of its records, reused when the same command runs again."""
        return self.folder / PARTS / f"{self.name}.json"

    def records(self) -> list[Record] | None:
        """Its records; None if it isn't finished: its overlay must exist, too, where one is drawn."""
        found = load_records(self.part, self.key)
        lacks_overlay = any(map(self.draws, found or ())) and not (self.folder / self.name).is_file()
        return None if lacks_overlay else found

    def draws(self, record: Record) -> bool:
        """Whether an overlay is drawn of this image or frame."""
        return is_video(self.path) or record.height * record.width <= LARGEST_PICTURE


def model_version(model: str, config: PreTrainedConfig) -> str:
    """A digest of what predictions depend on besides the input: name, configuration, and date or commit of weights."""
    dates = [file.stat().st_mtime_ns for file in sorted(Path(model).glob("model*.safetensors"))]
    rules = ["one object for each query", CANDIDATES]  # results of versions with other rules are not reused
    facts = [model, config.to_dict(), vars(config).get("_commit_hash"), dates, rules]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _job_key(version: str, path: Path, options: PredictOptions) -> tuple[object, ...]:
    return (
        version,
        str(path),
        path.stat().st_mtime_ns if path.is_file() else None,
        options.threshold,
        options.tile,
        options.overlap,
        options.pixel_range,
        options.precision,
    )


def tiling_for(predictor: Predictor, options: PredictOptions) -> Tiling | None:
    """The tiling of the options, by default the model's own; None for whole images.

    Raises:
        RecipeError: a tile has more pixels than an image may have
    """
    own, config = predictor.tiling, predictor.model.config
    side = (own.side if own else 0) if options.tile is None else options.tile
    overlap = config.tile_overlap if options.overlap is None else options.overlap
    if side * side > max_pixels():
        raise RecipeError(
            f"a tile of {side} x {side} pixels has more than --max_pixels {max_pixels():,}: lower --tile, or raise"
            " --max_pixels."
        )
    return Tiling(side, overlap, predictor.padded_size) if side else None


def run_jobs(
    predictor: Predictor, jobs: Sequence[Job], options: PredictOptions
) -> Iterator[tuple[Job, M2FError | None]]:
    """Predict images, then videos; yield each job when its files are written, or with the error of its input."""
    images = [job for job in jobs if not is_video(job.path)]
    failed: dict[int, M2FError] = {}
    found = predictor.stream(
        (job.path for job in images),
        batch_size=options.batch_size,
        threshold=options.threshold,
        unreadable=failed.__setitem__,
    )
    for instances in found:
        if instances.image_id in failed:
            continue  # a later tile of it can't be read
        job = images[instances.image_id]
        try:
            _finish_image(job, instances, predictor)
        except ImageError as error:  # the file has changed since
            failed[instances.image_id] = error
            continue
        yield job, None
    yield from ((images[position], error) for position, error in sorted(failed.items()))
    for job in jobs:
        if is_video(job.path):
            try:
                _predict_video(job, predictor, options)
            except (ImageError, MissingPackageError) as error:
                yield job, error
            else:
                yield job, None


def _finish_image(job: Job, instances: Instances, predictor: Predictor) -> None:
    record = record_of(str(job.path), instances)
    if job.draws(record):
        box = (0, 0, record.width, record.height)
        pixels = windows_of(job.path, str(job.path), predictor.pixel_range).read(box)
        save_image(instances.overlay(Image.fromarray(pixels), predictor.names), job.folder / job.name)
    save_records(job.part, job.key, [record])


def _predict_video(job: Job, predictor: Predictor, options: PredictOptions) -> None:
    seen, drawn = tee(frames(job.path))  # buffers one batch of frames
    found = predictor.stream(seen, batch_size=options.batch_size, threshold=options.threshold)
    records: list[Record] = []

    def pictures() -> Iterator[Image.Image]:
        for number, (instances, frame) in enumerate(zip(found, drawn, strict=True)):
            records.append(record_of(f"{job.path}#{number}", instances))
            yield instances.overlay(frame, predictor.names, legend=False)  # the frames of a video must have equal size

    write_video(pictures(), job.folder / job.name, frame_rate(job.path))
    save_records(job.part, job.key, records)


def is_video(path: Path) -> bool:
    """Whether the file name has a video's suffix."""
    return path.suffix.lower() in VIDEOS


def _is_input(path: Path, passed_over: Counter[str]) -> bool:
    """Whether a path is an image or video by its suffix; other files are counted, except overlays and hidden ones."""
    if is_hidden(path) or Path(path.stem).suffix == DRAWN or path.is_dir():
        return False
    suffix = path.suffix.lower()
    if suffix in (*SUFFIXES, *VIDEOS):
        return True
    passed_over[suffix] += 1
    return False


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """Counts of the skipped files by suffix, "" if there are none."""
    if not passed_over:
        return ""
    counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(passed_over.items()))
    heic = f" ({HEIC_ADVICE})" if {".heic", ".heif", ".hif"} & passed_over.keys() else ""
    return f"{sum(passed_over.values())} file(s) without the suffix of an image or video: {counts}{heic}"


def find_inputs(source: Path, recursive: bool, passed_over: Counter[str]) -> Iterator[Path]:
    """The image or video itself, or those of a folder or glob, sorted; other files are counted by suffix.

    Raises:
        DataError: nothing is found
    """
    if source.is_dir():
        inside = source.rglob("*") if recursive else source.iterdir()
        yield from sorted(path for path in inside if _is_input(path, passed_over))
        if not recursive and (folders := sum(path.is_dir() and not is_hidden(path) for path in source.iterdir())):
            logger.warning("%s: %d subfolder(s) are passed over; --recursive includes them.", source, folders)
    elif source.is_file():
        yield source
    elif matching := sorted(glob.glob(str(source), recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute pattern)
        yield from (path for path in map(Path, matching) if _is_input(path, passed_over))
    else:
        raise DataError(f"{source}: expected an image, a folder of images or a pattern, found nothing. Check the path.")


def _without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Each input once, in the order in which they are first named; a link of another file name is another input."""
    first: dict[Path, Path] = {}
    resolved = cache(Path.resolve)  # of each folder once
    for path in paths:
        first.setdefault(resolved(path.parent) / path.name, path)
    return list(first.values())


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A unique file name for each overlay; inputs of the same name in several folders get a number.

    The suffix `.instances` keeps it different from the input's name: `output_dir` may be the folder of the inputs.
    Names that differ only in case count as equal: on Windows and macOS the second overlay would replace the first.
    Names of more than `LONGEST_STEM` bytes are cut and end with a hash.
    """
    names, seen = [], set()
    for path in paths:
        stem, suffix = short_stem(path), DRAWN + (".mp4" if is_video(path) else ".png")
        name, number = f"{stem}{suffix}", 1
        while name.lower() in seen:
            number += 1
            name = f"{stem}-{number}{suffix}"
        seen.add(name.lower())
        names.append(name)
    return names


def short_stem(path: Path) -> str:
    """The file name without suffix; one of more than `LONGEST_STEM` bytes is cut, and its hash is added."""
    stem = os.fsencode(path.stem)
    if len(stem) <= LONGEST_STEM:
        return path.stem
    end = "-" + hashlib.sha256(stem).hexdigest()[:12]
    return stem[: LONGEST_STEM - len(end)].decode("utf-8", "ignore") + end
