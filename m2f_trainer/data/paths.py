"""Where a `file_name` leads: never out of its image folder, links followed."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from m2f_trainer.errors import DataError


def resolve_inside(folder: Path, name: str, where: str) -> Path:
    """The path of a `file_name`, which must stay inside its image folder, links followed.

    Raises:
        DataError: an absolute path, `..`, a link out of the folder, a NUL, or Windows separators
    """
    if "\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(
            f"{where}: expected a `file_name` relative to {folder} with / between folders, without '..', got {name!r}."
            " Correct the file name."
        )
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 (called for every image with folders in its name)
    if not path.startswith(root.rstrip("/") + "/"):
        raise DataError(
            f"{where}: `file_name` {name!r} leads out of {folder}, to {path}. Copy the file into the folder."
        )
    return Path(path)


def found_by_name(folder: Path, name: str) -> str | None:
    """The `file_name` of a file in the folder or its `images` that is called as `name` is at its end."""
    base, root = base_of(name), os.path.realpath(folder)
    for found in (base, f"images/{base}") if base and "\0" not in base else ():
        path = os.path.realpath(folder / found)
        if path.startswith(root.rstrip("/") + "/") and os.path.isfile(path):  # noqa: PTH113
            return found
    return None


def base_of(name: str) -> str:
    """A path's last part, after / and \\."""
    return PureWindowsPath(name).name
