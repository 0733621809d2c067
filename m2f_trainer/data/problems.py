"""The kinds of problems that a dataset can have: title, reason, remedy, and what `m2f check --fix` does about each.

Readers of annotations pass every problem to a `Report` and then leave the faulty part out. A value in an unusual
notation with an unambiguous meaning is used, and reported as a note. For training, the report is `TrainingReport`,
which raises at the first error; for `m2f check` it is `Findings`, which collects all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from m2f_trainer.errors import DataError, ImageError, ImageSizeError, MaskError, MissingImageError, printable

Key: TypeAlias = int | str
Severity: TypeAlias = Literal["error", "warning", "note"]
"""An error stops training; a warning should be looked at; a note reports a value that was converted."""

ADD_OUTLINES = "Add outlines: a promptable model such as SAM turns boxes into masks (in CVAT, Label Studio or FiftyOne)"
"""Advice on a dataset of boxes only."""

LISTED = 10  # ids or images that a message names
LONGEST_LABEL = 40  # characters of a class name in a table


@dataclass(frozen=True)
class Kind:
    """One kind of problem. `fix` describes what `m2f check --fix` does with each case; "" if the user has to decide.

    `raises` is the error that training raises for it.
    """

    severity: Severity
    title: str
    why: str
    remedy: str
    fix: str = ""
    raises: type[DataError] = DataError


def _error(title: str, why: str, remedy: str, fix: str = "", raises: type[DataError] = DataError) -> Kind:
    return Kind("error", title, why, remedy, fix, raises)


def _warning(title: str, why: str, remedy: str, fix: str = "") -> Kind:
    return Kind("warning", title, why, remedy, fix)


def _note(title: str, why: str, fix: str) -> Kind:
    return Kind("note", title, why, "Nothing.", fix)


KINDS: Mapping[str, Kind] = {
    "unusable": _error(
        "can't be read at all",
        "Nothing in it can be used for training.",
        "Follow the message, then run the check again.",
    ),
    "bad-image-entry": _error(
        "invalid image entry",
        "Without an id, a file name and a size, the annotations of the image can't be placed.",
        "Correct the entry.",
        "removed",
    ),
    "bad-annotation-entry": _error(
        "invalid annotation entry",
        "It can't be assigned to an image and a category.",
        "Correct the entry.",
        "removed",
    ),
    "bad-category-entry": _error(
        "invalid category entry", "Its annotations have no class.", "Correct the entry.", "removed"
    ),
    "unnamed-category": _error(
        "category without a name",
        "Classes are matched by name.",
        "Name it.",
        "named after its id",
    ),
    "duplicate-image-id": _error(
        "one id for two images",
        "Annotations of one image would be drawn on the other.",
        "Give each image its own id, and its annotations the same `image_id`.",
    ),
    "repeated-image-entry": _error(
        "image listed twice under one id",
        "Two images may have been meant.",
        "List each image once.",
        "the first is kept",
    ),
    "duplicate-annotation-id": _error(
        "annotation id used twice",
        "COCO scorers match masks by annotation id and would take the wrong mask.",
        "Renumber the annotations.",
        "renumbered",
    ),
    "duplicate-category-id": _error(
        "category listed twice",
        "Two classes may have been meant.",
        "List each category once.",
        "the first is kept",
    ),
    "two-category-names": _error(
        "two names for one category id",
        "Two classes would be merged into one.",
        "Give each class its own id, in `categories` and in its annotations.",
    ),
    "orphan-annotation": _error(
        "annotation of an image that doesn't exist", "The object would be lost.", "Add the image.", "removed"
    ),
    "unknown-category": _error(
        "annotation of a category that doesn't exist", "The object would be lost.", "Add the category.", "removed"
    ),
    "bad-crowd": _error(
        "`iscrowd` that isn't 0 or 1",
        "Crowd regions are excluded from training and scored differently.",
        "Write 0 or 1.",
        "removed",
    ),
    "bad-mask": _error(
        "invalid segmentation",
        "Such polygons and RLEs crash or hang pycocotools, or decode to uninitialised memory.",
        "Correct the polygon or RLE, or remove the annotation.",
        "removed",
        MaskError,
    ),
    "no-mask": _error(
        "object without a mask",
        "Its `segmentation` is empty, and an object without a mask is learnt as background.",
        f"{ADD_OUTLINES}, or leave out its image. Remove the annotation if there is no object.",
        "removed: the object becomes background",
        MaskError,
    ),
    "bad-box": _error(
        "invalid `bbox`",
        "Box AP is computed from it.",
        "Correct it, or leave it out.",
        "recomputed from the mask",
    ),
    "bad-area": _error(
        "invalid `area`",
        "AP for small, medium and large objects is computed from it.",
        "Correct it, or leave it out.",
        "recomputed from the mask",
    ),
    "unsafe-path": _error(
        "file name that leads out of the dataset folder",
        "Files outside the dataset folder are never read.",
        "Correct the file name.",
        "replaced by the file of that name in the image folder where there is exactly one, else removed",
    ),
    "missing-image": _error(
        "image file missing",
        "Training would stop when it loads the image.",
        "Add the file, name the folder of the images with --images SPLIT=FOLDER, or remove the image and its"
        " annotations.",
        "removed",
        MissingImageError,
    ),
    "ambiguous-image": _error(
        "file name that may be several files",
        "Another image would be trained with these annotations.",
        "Write the path of the image below the dataset folder.",
    ),
    "two-image-folders": _error(
        "two folders with images of the same names",
        "One of them may hold label pictures or other images.",
        "Give --images SPLIT=FOLDER, or move the other folder away.",
    ),
    "bad-image": _error(
        "image file unreadable",
        "Training would stop when it loads the image.",
        "Replace the file, or remove the image and its annotations.",
        "removed",
        ImageError,
    ),
    "wrong-image-size": _error(
        "image size differs from its annotations",
        "Its masks would not match its objects.",
        "Restore the annotated image, or correct `width` and `height`.",
        "removed",
        ImageSizeError,
    ),
    "exif-frame": _error(
        "photo with an EXIF rotation whose annotations fit both frames",
        "Its masks would be turned against its objects.",
        "Give --exif_frame displayed if the photos were annotated as viewers show them, else --exif_frame stored.",
    ),
    "renamed-category": _error(
        "category id with two names",
        "The splits disagree on the name of a class, or use its id for another class.",
        "Use one name in all splits, or two ids.",
    ),
    "repeated-category-name": _error(
        "one name for two category ids",
        "Objects of one class would be trained as two different classes.",
        "Merge or rename them.",
        "merged",
    ),
    "outside-image": _error(
        "object outside of its image",
        "It has no pixel: the outline belongs to another image or to another size of the image.",
        "Scale the outlines to the images, or use the images that were annotated.",
    ),
    "missing-split": _error(
        "split missing or empty",
        "Training needs images to train on and others to evaluate on.",
        "Add the split. Without a valid split, a fifth of the training images is held out if there are at least five.",
    ),
    "no-objects": _error(
        "no objects to train or evaluate on",
        "A split without objects can't be trained on and has no score.",
        "Annotate objects in it.",
    ),
    "duplicate-image": _warning(
        "duplicate image within a split",
        "It counts twice in training or in the score.",
        "Keep one of them.",
        "the first is kept with all objects, unless the images differ by what could be an object",
    ),
    "leakage": _warning(
        "same image in two splits",
        "Scores on images that were trained on are too high.",
        "Keep it in one split: `m2f check --fix FOLDER --remove_leaked` removes it from train, or from valid if test"
        " has it.",
    ),
    "box-mismatch": _warning(
        "`bbox` doesn't match the mask",
        "One of the two is wrong; box AP is computed from `bbox`.",
        "Recompute the box from the mask.",
        "recomputed from the mask",
    ),
    "area-mismatch": _warning(
        "`area` doesn't match the mask",
        "AP for small, medium and large objects is computed from `area`.",
        "Recompute the area from the mask.",
        "recomputed from the mask",
    ),
    "empty-mask": _warning(
        "empty mask",
        "It has no pixel to train on and always counts as missed. The polygon is too small or covers itself twice.",
        "Correct or remove the annotation.",
        "removed",
    ),
    "duplicate-object": _warning(
        "object annotated twice",
        "Another annotation of the image has the same mask and class; a model can't match both.",
        "Keep one of them.",
        "the first is kept",
    ),
    "object-of-two-classes": _warning(
        "one mask with two classes",
        "Annotations with the same mask contradict each other.",
        "Keep the annotation of the right class.",
    ),
    "tiny-object": _warning(
        "object smaller than one cell of the mask logits",
        "At the input size it is less than 4 pixels wide or high, which is one cell of the mask logits.",
        "Use a larger input size, or smaller tiles.",
    ),
    "no-area": _warning(
        "point or line",
        "It has no area to train on.",
        "Draw the outline of the object, or remove it.",
        "removed",
    ),
    "self-intersection": _warning(
        "self-intersecting polygon",
        "Regions that the polygon covers twice become holes.",
        "Redraw the polygon.",
    ),
    "held-out": _warning(
        "no validation split",
        "Training needs images to evaluate on, so a fifth of the training images is held out, chosen by a hash of the"
        " file name.",
        "To choose the validation images yourself, put them into a split named valid.",
        "written as a split named valid",
    ),
    "test-without-annotations": _warning(
        "test split without annotations",
        "It is not needed for training, and can't be scored.",
        "Add its annotations to score it.",
    ),
    "test-left-out": _warning(
        "test split without images or masks",
        "It is not needed for training, and can't be scored.",
        "Add its images and masks to score it.",
        "the split is left out: it has no images or masks",
    ),
    "brush-crowd": _warning(
        "CVAT brush mask exported as a crowd region",
        "CVAT exports objects drawn with its brush as crowd regions, which are excluded from training.",
        "If it is one object, set its `iscrowd` to 0.",
        "`iscrowd` set to 0",
    ),
    "missing-class": _warning(
        "class missing from a split",
        "A class without training objects can't be learned; one without validation objects has no score.",
        "Move images with this class into the split.",
    ),
    "exif-rotation": _warning(
        "image with an EXIF rotation",
        "Image viewers rotate it; masks are applied to the stored pixels, without the rotation.",
        "Look at its picture on the page of `m2f check --html`. If the mask is misplaced, give --exif_frame displayed.",
    ),
    "converted-image": _warning(
        "image that isn't 8-bit grey or RGB",
        "It is converted: values of more than 8 bits are scaled by pixel_range, transparency is dropped, CMYK and"
        " palettes become RGB.",
        "Look at its picture on the page of `m2f check --html`. If the conversion is wrong, convert it yourself.",
    ),
    "few-levels": _warning(
        "image with fewer than 64 grey levels after conversion to 8 bits",
        "What differs by less than a level can't be seen by the model.",
        "Give --pixel_range LOW,HIGH with the values that become black and white, or --pixel_range image to scale each"
        " image by itself.",
    ),
    "unused-category": _warning(
        "category without annotations",
        "It does not become a class of the model.",
        "Annotate objects of it, or remove it.",
        "removed",
    ),
    "duplicate-category-name": _warning(
        "two categories whose names differ only in case",
        "They are trained as two different classes.",
        "Merge or rename them.",
        "merged",
    ),
    "category-case": _warning(
        "category name that differs only in case between splits",
        "It is taken as the same class.",
        "Use one spelling; if there are two classes, give them different names.",
        "written in the spelling of the first split",
    ),
    "other-image-folder": _warning(
        "another folder has files of the same names",
        "It may hold label pictures, or the images that were meant.",
        "If it is the right one, give --images SPLIT=FOLDER.",
    ),
    "many-instances": _warning(
        "more instances than queries",
        "The model predicts at most one instance per query, so the others can't be found.",
        "Raise `num_queries`.",
    ),
    "size-from-file": _note("image size read from the file", "The annotation file has none that is valid.", "written"),
    "unusual-number": _note("number written as text or as a fraction", "It is the same number.", "written as a number"),
    "number-as-name": _note("category named by a number", "Its name is that number as text.", "written as text"),
    "unusual-id": _note(
        "id that isn't an integer of 64 bits", "It is used as it is, under a number.", "replaced by a number"
    ),
    "missing-id": _note("annotation without an id", "Nothing refers to it.", "numbered"),
    "found-image": _note(
        "image found under another spelling of its name",
        "No other image file has this name in any spelling.",
        "written under the name of the file",
    ),
    "image-inside": _note(
        "image read from its annotation file", "No image file belongs to it.", "written as an image file"
    ),
    "merged-entries": _note(
        "image listed more than once",
        "The entries name one file: their annotations belong to one image.",
        "merged into the first entry",
    ),
    "unusual-outline": _note(
        "polygon as flat numbers, points or text", "It is the same polygon.", "written as COCO polygons"
    ),
    "stray-part": _note(
        "part of a polygon with fewer than three points",
        "It covers no pixel; the other parts are used.",
        "the part is removed",
    ),
    "void-border": _note("void border of Pascal VOC in a mask", "It separates objects and is none.", "left out"),
    "unusual-rle": _note(
        "RLE without size, with swapped size, or with counts as Python bytes or fractions",
        "Its mask has the annotation's box.",
        "written as COCO RLE",
    ),
    "turned-image": _note(
        "image turned by its EXIF orientation", "Its annotations lie on the image as viewers show it.", ""
    ),
    "pixel-range": _note(
        "values of more than 8 bits scaled to 8 bits", "The full range of the format would leave few grey levels.", ""
    ),
    "renumbered-category": _note(
        "category id that differs between splits",
        "Classes are matched by name.",
        "written with the id of the first split",
    ),
}


class Report(Protocol):
    """Receives one problem: its kind, the file, the ids concerned, the full message, and the image id to show it on."""

    def __call__(self, kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None: ...


def raise_problem(kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
    """The `Report` that raises the error of the problem's kind; warnings and notes are passed over."""
    if KINDS[kind].severity == "error":
        raise KINDS[kind].raises(message)


@dataclass
class Finding:
    """All cases of one kind in one file; `message` is that of the first case."""

    kind: str
    file: str
    message: str
    ids: list[Key] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    @property
    def count(self) -> int:
        return max(1, len(self.ids))

    def to_json(self) -> dict[str, Any]:
        kind = KINDS[self.kind]
        return {
            "severity": kind.severity,
            "kind": self.kind,
            "title": kind.title,
            "count": self.count,
            "file": self.file,
            "ids": self.ids[:1000],
            "message": self.message,
            "why": kind.why,
            "remedy": kind.remedy,
            "fix": kind.fix,
        }


class Findings:
    """The `Report` that collects: one finding for each kind and file."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}

    def __call__(self, kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
        finding = self._found.setdefault((kind, str(file)), Finding(kind, str(file), message))
        finding.ids.extend(ids)
        if image is not None:
            finding.images.append(image)

    def sorted(self) -> list[Finding]:
        """In the order of `KINDS`: errors first."""
        order = list(KINDS)
        return sorted(self._found.values(), key=lambda finding: (order.index(finding.kind), finding.file))


class TrainingReport(Findings):
    """The `Report` of training: errors are raised, warnings and notes collected."""

    def __call__(self, kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
        raise_problem(kind, file, ids, message)
        super().__call__(kind, file, ids, message, image)


def kind_of(error: ImageError) -> str:
    """The kind of problem of an image that can't be used."""
    if isinstance(error, MissingImageError):
        return "missing-image"
    return "wrong-image-size" if isinstance(error, ImageSizeError) else "bad-image"


def listed(values: Sequence[object]) -> str:
    """The first `LISTED` values, and how many there are in all where there are more."""
    more = f", ... ({len(values)} in all)" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED])) + more


def label_text(name: str) -> str:
    """The name of a class for a table: printable, and cut where it would push the other columns off the screen."""
    text = printable(name)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."
