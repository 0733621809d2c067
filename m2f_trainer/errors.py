"""All errors for users, as one tree. Each message says what was expected, what was found, where, and what to do.

    M2FError
    ├── RecipeError          an invalid option or recipe file, or contradicting options
    │   └── UsageError       a command line that can't be parsed
    ├── DataError            a dataset folder or annotation file that can't be used
    │   ├── EmptySplitError  a split without images, or with boxes only
    │   ├── ImageError       an image that can't be used (MissingImageError, ImageSizeError, PixelRangeError)
    │   └── MaskError        a polygon or an RLE that doesn't describe a mask
    ├── ModelFolderError     a model folder that can't be used for what was asked
    ├── CheckpointError      a checkpoint that is incomplete, damaged or from another run
    ├── TrainingError        a run that can't continue (non-finite loss, dead worker, full disk)
    ├── SharingError         an upload that was refused or failed
    ├── ArgumentError        an argument of the Python API that has the wrong type; also a TypeError
    └── MissingPackageError  an optional package that isn't installed

`model/` is uploaded to the Hub without the rest, so it raises its own `ModelError` (`m2f_trainer/model/backbones.py`).
"""

import difflib
import importlib.util
import os
import re
from pathlib import Path


class M2FError(Exception):
    """Base class: the command line prints the message without a traceback and exits with `status`."""

    status = 1


class RecipeError(M2FError):
    """A recipe or option is invalid: unknown, duplicate, of the wrong type, or contradicting another."""


class UsageError(RecipeError):
    """The command line can't be parsed: an option is unknown, duplicate or of the wrong type."""

    status = 2  # as argparse's


class DataError(M2FError):
    """A dataset folder or its annotations can't be used as they are."""


class EmptySplitError(DataError):
    """A split has no image, or only boxes where masks are needed; a test split may, as training doesn't need it."""


class ImageError(DataError):
    """An image is missing, unreadable, or not of the form its annotations describe."""


class MissingImageError(ImageError):
    """The file of an image does not exist."""


class ImageSizeError(ImageError):
    """An image has another size than its annotations say."""


class PixelRangeError(ImageError):
    """The values of an image can't be scaled to 8 bits without a pixel_range."""


class MaskError(DataError):
    """A polygon or an RLE does not describe a mask of its image."""


class ModelFolderError(M2FError):
    """A model folder can't be used for what was asked."""


class CheckpointError(M2FError):
    """A checkpoint is incomplete, damaged or belongs to another run."""


class TrainingError(M2FError):
    """A run can't continue."""


class SharingError(M2FError):
    """An upload was rejected or failed; the local files are unchanged."""


class ArgumentError(M2FError, TypeError):
    """An argument of a function or class has the wrong type; the message names it and the accepted types."""


class MissingPackageError(M2FError):
    """An optional package is not installed; the message names the extra that installs it."""


class RunStopped(KeyboardInterrupt):
    """A signal stopped the run; its state is saved, and it can be resumed.

    Outside the tree, like KeyboardInterrupt, so that `except Exception` does not handle it as a failure.
    """

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def needs(*packages: str, extra: str) -> None:
    """Check that optional packages are installed.

    Raises:
        MissingPackageError: one isn't; the message names the extra that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"this needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'm2f-trainer[{extra}]'"
        )


def escape_controls(text: str, kept: str = "") -> str:
    r"""The text with its control characters as escapes, such as \x1b, except those in `kept`.

    Names of files and classes are untrusted: a terminal would execute escape sequences in them, and characters that
    change the direction of text can hide a suffix.
    """
    return re.sub(CONTROLS, lambda found: found[0] if found[0] in kept else escaped(found[0]), text)


def printable(text: str) -> str:
    """The text with every character that can't be printed, such as a control character, replaced by "?"."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def escaped(letter: str) -> str:
    r"""A character as Python writes it, such as \x1b or \u202e."""
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"


CONTROLS = "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]"
"""Control characters, line separators, and marks of the direction of text."""

MEMORY_ADVICE = (
    "Lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), image_height and "
    "image_width; or set gradient_checkpointing true, tune lora or frozen, or auto_find_batch_size true"
)


def mistyped_path(name: str) -> str:
    """A message that the path does not exist, with the nearest existing name; "" if it exists or may be a Hub id.

    A name may be a Hub id if it has the form `user/name`, `user` is no folder here, and no similar path exists.
    """
    path = Path(name)
    if not name or os.path.exists(name):  # noqa: PTH110 (False, not an error, for a name that is too long)
        return ""
    place, is_complete = Path(path.anchor), True
    for part in path.relative_to(path.anchor).parts:
        try:
            similar = [] if (place / part).exists() else difflib.get_close_matches(part, _names_in(place), n=1)
            is_complete = bool(similar) or (place / part).exists()
        except (OSError, ValueError):  # a name that is too long, or has a NUL
            is_complete = False
        if not is_complete:
            break
        place = place / (similar[0] if similar else part)
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.exists(path.parent)  # noqa: PTH110
    if on_hub and not is_complete:
        return ""
    return f"{name}: there is no such file or folder" + (f"; the nearest name is {place}." if is_complete else ".")


def missing_path(name: str | Path) -> str:
    """A message that a local path does not exist, with the nearest existing name; "" if it exists."""
    if os.path.exists(name):  # noqa: PTH110 (False, not an error, for a name that is too long)
        return ""
    return mistyped_path(str(name)) or f"{name}: there is no such file or folder."


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def check_model_path(name: str) -> None:
    """Raise ModelFolderError for a mistyped path of a model, before the Hub is asked for it."""
    problem = mistyped_path(name)
    if problem:
        raise ModelFolderError(f"{problem} Give a run's folder, one of its checkpoints, or user/name on the Hub.")
