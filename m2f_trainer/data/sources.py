"""Where the parts of a dataset come from: a COCO or a YOLO folder, or a dataset on the Hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from m2f_trainer.data.annotations import AnnotationFile, read_annotations
from m2f_trainer.data.findings import Report, refuse
from m2f_trainer.data.layouts import SplitFiles, find_layout, given_layout
from m2f_trainer.data.yolo import contents, find_yolo, read_yolo
from m2f_trainer.errors import DataError


def find_splits(
    root: str | Path,
    annotations: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
) -> tuple[SplitFiles, ...]:
    """The splits of a COCO folder, found or told, or else of a YOLO folder.

    Raises:
        DataError: neither is there
    """
    if annotations:
        return given_layout(root, annotations, images)
    try:
        return find_layout(root)
    except DataError:
        found = tuple(find_yolo(Path(root)))
        if not found:
            raise
        return found


def read_split(files: SplitFiles, report: Report = refuse) -> AnnotationFile:
    """Reads and checks one split. Raises DataError, which names file, ids and remedy."""
    return read_yolo(files, report) if _is_yolo(files) else read_annotations(files, report)


def contents_of(files: SplitFiles) -> Iterator[bytes]:
    """All that the rows of a split depend on, but for the images.

    Raises:
        DataError: it can't be read
    """
    try:
        if _is_yolo(files):
            yield from contents(files)
        else:
            with files.annotations.open("rb") as file:
                while part := file.read(1 << 22):
                    yield part
    except OSError as error:
        raise DataError(f"{files.annotations}: can't be read ({error}). Check path and permissions.") from error


def _is_yolo(files: SplitFiles) -> bool:
    return files.annotations.suffix in (".yaml", ".yml")
