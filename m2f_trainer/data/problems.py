"""What can be wrong with a dataset: every kind of finding, why it matters, what to do, and what `--fix` does about it.

Readers of annotations take a `Report`, which they call for each problem before they go on without the faulty part:
`refuse` raises at the first one, for training; `Findings` collects them all, for `m2f check`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from m2f_trainer.errors import DataError, ImageError, MaskError

Key: TypeAlias = int | str
Severity: TypeAlias = Literal["error", "warning"]
LISTED = 10


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `fix` is what a corrected copy does to each case, "" where a person has to decide."""

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


KINDS: Mapping[str, Kind] = {
    "unusable": _error(
        "can't be read at all", "Nothing in it can be trained on.", "Follow the message, then check again."
    ),
    "missing-split": _error(
        "split missing or empty",
        "Training needs images to learn from and others to score on.",
        "Add the split, or images: of five or more in train, a fifth is held out to score on.",
    ),
    "no-objects": _error(
        "nothing to learn", "A split without objects teaches nothing and has no score.", "Annotate objects in it."
    ),
    "bad-image-entry": _error(
        "image entry unusable", "Without id, name and size its annotations have no frame.", "Correct it.", "left out"
    ),
    "bad-annotation-entry": _error(
        "annotation entry unusable", "It can't be tied to an image and a category.", "Correct it.", "left out"
    ),
    "bad-category-entry": _error(
        "category entry unusable", "Its annotations have no class.", "Correct it.", "left out"
    ),
    "duplicate-image-id": _error(
        "image id used twice",
        "Annotations of one image land on the other.",
        "Renumber the images.",
        "the first is kept",
    ),
    "duplicate-annotation-id": _error(
        "annotation id used twice", "Scorers match masks by id and take the wrong one.", "Renumber them.", "renumbered"
    ),
    "duplicate-category-id": _error(
        "category id used twice", "Two classes become one.", "Give each category its own id.", "the first is kept"
    ),
    "orphan-annotation": _error(
        "annotation of an image that isn't there", "It would be lost without a word.", "Add the image.", "left out"
    ),
    "unknown-category": _error(
        "annotation of an unknown category", "It would be lost without a word.", "Add the category.", "left out"
    ),
    "bad-crowd": _error(
        "`iscrowd` that isn't 0 or 1", "Crowds are never trained on, and scored apart.", "Write 0 or 1.", "left out"
    ),
    "bad-mask": _error(
        "segmentation that is no mask",
        "Such polygons and RLEs crash or hang the C code of COCO's tools, or decode to noise.",
        "Correct the outline or remove the annotation.",
        "left out",
        MaskError,
    ),
    "bad-box": _error(
        "`bbox` that is no box", "Box scores need it.", "Correct it or leave it out.", "recomputed from the mask"
    ),
    "bad-area": _error(
        "`area` that is no area", "Scores by size need it.", "Correct it or leave it out.", "recomputed from the mask"
    ),
    "unsafe-path": _error(
        "file name that leaves the dataset",
        "A dataset must not read files outside its folder.",
        "Correct it.",
        "taken by its name where its folder has such a file, else left out",
    ),
    "missing-image": _error(
        "image file missing",
        "The run would stop at it.",
        "Add the file or remove its annotations.",
        "left out",
        ImageError,
    ),
    "bad-image": _error(
        "image file unreadable", "The run would stop at it.", "Replace the file or remove it.", "left out", ImageError
    ),
    "wrong-image-size": _error(
        "image of another size than annotated",
        "Its masks would lie beside its objects.",
        "Put the annotated image back, or correct `width` and `height`.",
        "left out",
        ImageError,
    ),
    "renamed-category": _error(
        "category id with two names", "Splits disagree on what a class is.", "Give it one name, or two ids."
    ),
    "duplicate-image": _warning(
        "image twice in a split", "It counts double.", "Keep one.", "the first is kept, where no object sets them apart"
    ),
    "leakage": _warning(
        "image in two splits",
        "Scores on images that were trained on are too good.",
        "Keep it in one split.",
        "left out of the split that trains, or comes first, where no object sets them apart",
    ),
    "box-mismatch": _warning(
        "`bbox` beside its mask", "One of the two is wrong; box scores use the box.", "Recompute it.", "recomputed"
    ),
    "area-mismatch": _warning(
        "`area` that isn't the mask's", "Scores by size sort objects by it.", "Recompute it.", "recomputed"
    ),
    "empty-mask": _warning(
        "mask without a pixel",
        "Nothing can be learnt from it, and it counts as missed. It lies outside its image or covers itself twice.",
        "Correct or remove it.",
        "left out",
    ),
    "tiny-object": _warning(
        "object smaller than a cell of the mask map",
        "At the input size it is under 4 pixels wide or high, where masks have one value.",
        "Use a larger input size or tiles.",
    ),
    "self-intersection": _warning(
        "polygon that crosses itself", "What is covered twice becomes a hole.", "Redraw the outline."
    ),
    "held-out": _warning(
        "no validation split",
        "Training needs images to score on, and holds out a fifth of these, chosen by their names.",
        "To choose them yourself, put them into a split named valid.",
        "put into a split valid",
    ),
    "brush-crowd": _warning(
        "crowd region of CVAT's making",
        "CVAT writes an object drawn with its brush as a crowd region, which is never trained on.",
        "If it is one object, set its `iscrowd` to 0.",
        "taken as one object",
    ),
    "missing-class": _warning(
        "class missing from a split",
        "Without training objects it can't be found; without validation objects it has no score.",
        "Move some of its images there.",
    ),
    "exif-rotation": _warning(
        "image that viewers turn",
        "Its EXIF tag turns it on screen, but masks are taken as drawn on the stored pixels.",
        "Look at its picture; if the mask is off, save the image turned and without the tag.",
    ),
    "converted-image": _warning(
        "image that isn't 8-bit grey or RGB",
        "It is converted: 16 bits are scaled to 8, transparency is dropped, CMYK and palettes become RGB.",
        "Look at its picture; convert it yourself where that isn't right.",
    ),
    "unused-category": _warning(
        "category without annotations", "It becomes no class of the model.", "Remove it, or annotate it.", "left out"
    ),
    "duplicate-category-name": _warning(
        "two categories of one name", "They are trained as two classes.", "Merge or rename them.", "merged"
    ),
    "many-instances": _warning(
        "more instances than queries", "Those beyond the queries can't be found.", "Raise `num_queries`."
    ),
}


class Report(Protocol):
    """Takes one problem: its kind, the file, the ids it concerns, a full message, and the image to show it on."""

    def __call__(self, kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None: ...


def refuse(kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
    """Raises the problem: the report of those who can't go on without what is wrong."""
    raise KINDS[kind].raises(message)


@dataclass
class Finding:
    """All cases of one kind in one file; `message` tells the first."""

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

    def some_ids(self) -> str:
        """The first ten, and how many there are."""
        return some(self.ids)

    def to_json(self) -> dict[str, Any]:
        kind = KINDS[self.kind]
        told = {"severity": kind.severity, "kind": self.kind, "title": kind.title, "count": self.count}
        where = {"file": self.file, "ids": self.ids[:1000], "message": self.message}
        return {**told, **where, "why": kind.why, "remedy": kind.remedy, "fix": kind.fix}


class Findings:
    """A report that collects: one finding for each kind and file."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}

    def __call__(self, kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
        finding = self._found.setdefault((kind, str(file)), Finding(kind, str(file), message))
        finding.ids.extend(ids)
        if image is not None:
            finding.images.append(image)

    def listed(self) -> list[Finding]:
        """Errors first, in the order of `KINDS`."""
        order = list(KINDS)
        return sorted(self._found.values(), key=lambda finding: (order.index(finding.kind), finding.file))


def some(values: Sequence[object]) -> str:
    """The first ten, and how many there are."""
    more = f", ... ({len(values)} in all)" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED])) + more


def printable(text: str) -> str:
    """Text from a dataset without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
