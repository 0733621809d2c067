"""`m2f predict`: images and folders of images -> pictures with instances drawn, and one file in COCO results form."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from m2f_trainer.data.images import SUFFIXES, open_image
from m2f_trainer.errors import DataError
from m2f_trainer.inference.predictor import Predictor

PREDICTIONS = "predictions.json"


def predict_folder(
    model: str,
    inputs: Sequence[Path],
    output_dir: Path,
    threshold: float = 0.5,
    recursive: bool = False,
    batch_size: int = 4,
) -> Path:
    """Predict every image, write `<name>.png` with its instances, and predictions.json; return the folder.

    predictions.json is in COCO results form, with the dataset's own category ids; `image_id` counts the images, and
    each result names its file too.

    Raises:
        DataError: an input isn't there, or there is no image in it
        ImageError: an image can't be read
    """
    predictor = Predictor.from_pretrained(model)
    paths = [path for given in inputs for path in images_of(given, recursive)]
    if not paths:
        raise DataError(
            f"no image found in {', '.join(map(str, inputs))} (looked for {', '.join(SUFFIXES)}"
            f"{'' if recursive else '; --recursive looks into subfolders too'})"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    found = predictor.stream(paths, batch_size=batch_size, threshold=threshold)
    results = []
    for path, name, instances in zip(paths, picture_names(paths), tqdm(found, total=len(paths)), strict=True):
        instances.overlay(open_image(path, str(path)), predictor.names).save(output_dir / name)
        results += [{**result, "file_name": str(path)} for result in instances.to_coco()]
    (output_dir / PREDICTIONS).write_text(json.dumps(results), encoding="utf-8")
    return output_dir


def images_of(given: Path, recursive: bool) -> Iterator[Path]:
    """The image itself, or the images of a folder in the order of their names. Raises DataError."""
    if given.is_dir():
        inside = given.rglob("*") if recursive else given.iterdir()
        yield from sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
    elif given.is_file():
        yield given
    else:
        raise DataError(f"{given}: expected an image or a folder of images, found nothing. Check the path.")


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture; images of one name in several folders are told apart by a number."""
    names, seen = [], set()
    for path in paths:
        name, number = f"{path.stem}.png", 1
        while name in seen:
            number += 1
            name = f"{path.stem}-{number}.png"
        seen.add(name)
        names.append(name)
    return names
