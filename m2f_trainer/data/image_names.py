"""Find the image files that annotations name: their folder, and names that differ in form from the files' names."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from m2f_trainer.data.files import is_hidden
from m2f_trainer.data.images import SUFFIXES
from m2f_trainer.data.layouts import IMAGE_FOLDERS, SPLITS, annotated_folder, split_of
from m2f_trainer.data.problems import Report
from m2f_trainer.errors import DataError

LINK_ADVICE = "If it is a link of your own, give --follow_links."

_COMPARED = 20  # images whose files are compared between two folders that hold the same names
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
_LABEL_STUDIO = "/data/local-files/?d="  # before the percent-encoded path of a file in its local storage


def is_inside(name: str) -> bool:
    """Whether a file name is relative, with / between folders and without "..", so that it stays in its folder."""
    path = PurePosixPath(name)
    return "\\" not in name and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def path_elsewhere(name: str) -> str | None:
    """The folders and the name, joined by /, of an absolute path or one with Windows separators, as another machine
    wrote it; None for other names, and for paths with "..".
    """
    if "\\" not in name and not PurePosixPath(name).is_absolute():
        return None
    path = PureWindowsPath(name)
    spelled = "/".join(path.relative_to(path.anchor).parts)
    return spelled if spelled and is_inside(spelled) else None


def is_address(name: str) -> bool:
    """Whether a name is a URL with a scheme, such as s3:// or https://."""
    return _ADDRESS.match(name) is not None


class ImageNames:
    """The files that the images of one split name.

    Args:
        folders: those that the images may be in, the most likely first
        annotations: the annotation file
        split: the split, whose name a folder of its images may have
        root: the dataset folder, below which names are searched that no file below `folders` has, and which the image
            folder must not leave by a link unless `follow_links`; None for a folder that was given
        other_splits: in whose folders no image is searched, unless its name has the folder, too
        follow_links: whether files that are links are found, too
    """

    def __init__(
        self,
        folders: Sequence[Path],
        annotations: Path,
        split: str,
        root: Path | None = None,
        other_splits: Sequence[str] = (),
        follow_links: bool = False,
    ) -> None:
        self._annotations, self._split, self._root, self._follow_links = annotations, split, root, follow_links
        self._other_splits = frozenset(other_splits)
        self._best: Path | None = None
        self._folders = [folder for folder in folders if folder.is_dir()]
        if not self._folders:
            tried = ", ".join(map(str, folders))
            raise DataError(f"{annotations}: found none of its image folders: {tried}. Put the images in one of them.")
        self._places = [_Places(outermost(self._folders), follow_links)]
        if root is not None and outermost([*self._folders, root]) != self._places[0].folders:
            self._places.append(_Places([root], follow_links))

    def folder(self, names: Sequence[str], report: Report) -> Path:
        """The folder that holds most of the names, the first of several.

        Reports a folder that holds other files of the same names: an error, unless the first one is where images
        usually are and has all of them.
        """
        by_first: dict[str, set[str]] = {}
        for name in names:
            if is_inside(name) and len(name) < 4096:
                by_first.setdefault("".join(PurePosixPath(name).parts[:1]), set()).add(name)
        held = {folder: self._held(folder, by_first) for folder in self._folders}
        best = max(self._folders, key=lambda folder: len(held[folder]))
        for other in self._folders:
            same = sorted(held[best] & held[other]) if other != best else []
            differs = next((name for name in same[:_COMPARED] if files_differ(best / name, other / name)), None)
            if differs is None:
                continue
            certain = len(held[best]) == len(names) == len(set(names))
            usual = certain and self._is_usual(best) and not self._is_usual(other)
            kind = "other-image-folder" if usual else "two-image-folders"
            read = f"The images are read from {best}; if the other folder is meant, give" if usual else "Give"
            message = (
                f"{self._annotations}: {best} and {other} both have {differs!r} and {len(same) - 1} more of the named"
                f" images, with other content. {read} --images {self._split}=FOLDER."
            )
            report(kind, self._annotations, [other.name], message)
        self._check_inside(best)
        self._best = best
        return best

    def _check_inside(self, folder: Path) -> None:
        """Raise DataError for an image folder that is a link out of the dataset folder."""
        if self._follow_links or self._root is None:
            return
        allowed = [os.path.realpath(place) for place in (self._root, annotated_folder(self._annotations))]
        found = os.path.realpath(folder)
        if not any(Path(found).is_relative_to(place) for place in allowed):
            raise DataError(
                f"{folder}: the image folder leads out of {self._root}, to {found}. Copy the images into the dataset"
                f" folder. {LINK_ADVICE}"
            )

    def find(self, name: str) -> list[Path]:
        """The files that a name may refer to; a single one if it is unambiguous.

        The name may be a URL, or differ in folders, case, percent-encoding or Unicode form, or lack its ending. Among
        files with the same last part, those that share the most folders with the name are returned, if they share any.
        An absolute path, or one with \\ between its folders, only refers to files that share its last folder. Where the
        split has no folder of its own, and no other file is found, one in the folder of another split may be meant.
        """
        found = self._fitting(name, self._is_of_another_split)
        if not found and not self._has_own_folder:
            found = self._fitting(name, self._is_apart_in_another_split)
        return found if any(files_differ(found[0], other) for other in found[1:]) else found[:1]

    def find_in_other_splits(self, name: str) -> list[Path]:
        """The files below the folders, but in those of other splits, that a name would refer to."""
        parts = _parts(name)
        return [path for path in self._places[0].of_name(parts) if self._is_of_another_split(path, parts)]

    def relative(self, path: Path) -> str:
        """The path below the outermost folder that holds it, with / between folders."""
        folders = (folder for places in self._places for folder in places.folders)
        return next(path.relative_to(folder).as_posix() for folder in folders if path.is_relative_to(folder))

    def _fitting(self, name: str, is_excluded: Callable[[Path, Sequence[str]], bool]) -> list[Path]:
        """The files that may be meant by a name and share the most folders with it, without those excluded."""
        parts, is_elsewhere = _parts(name), path_elsewhere(name) is not None

        def fits(path: Path) -> bool:
            if is_excluded(path, parts):
                return False
            return _shared_folders(path, parts) > 0 or not (is_elsewhere or self._is_version(path.parent))

        groups = (group for places in self._places for group in places.by_shared_folders(parts))
        return next(filter(None, ([path for path in group if fits(path)] for group in groups)), [])

    def _is_of_another_split(self, path: Path, parts: Sequence[str]) -> bool:
        """Whether a file is in the folder of another split, and the name doesn't say so."""
        depth = self._depth(path)
        return depth is not None and _shared_folders(path, parts) <= depth

    def _is_apart_in_another_split(self, path: Path, parts: Sequence[str]) -> bool:
        """Whether a file is in the folder of another split, and shares no folder with the name."""
        return self._depth(path) is not None and _shared_folders(path, parts) == 0

    def _depth(self, path: Path) -> int | None:
        """How many folders around a file are below that of another split, None without one."""
        if path.parent not in self._depths:
            folders = PurePosixPath(self.relative(path)).parts[:-1]
            depths = (depth for depth, one in enumerate(reversed(folders)) if split_of(one) in self._other_splits)
            self._depths[path.parent] = next(depths, None)
        return self._depths[path.parent]

    def _is_version(self, folder: Path) -> bool:
        """Whether a folder has other files of the names in the image folder: label pictures, or reduced images."""
        if self._best is None or folder == self._best:
            return False
        if folder not in self._versions:
            same = sorted(self._listing(self._best) & self._listing(folder))[:_COMPARED]
            self._versions[folder] = any(files_differ(self._best / name, folder / name) for name in same)
        return self._versions[folder]

    def _listing(self, folder: Path) -> set[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = set(os.listdir(folder))  # noqa: PTH208 (names only, of perhaps 100,000 files)
            except OSError:
                self._listings[folder] = set()
        return self._listings[folder]

    def _held(self, folder: Path, by_first: Mapping[str, set[str]]) -> set[str]:
        """The names of files in a folder, of names by their first part."""
        return {
            name
            for first in by_first.keys() & self._listing(folder)
            for name in by_first[first]
            if "/" not in name or os.path.lexists(folder / name)
        }

    def _is_usual(self, folder: Path) -> bool:
        """Whether images are expected there: beside the annotations, in images, or in a folder named as the split."""
        name = folder.name.lower()
        own = re.sub(r"\.json(\.gz)?$", "", self._annotations.name.lower()).removeprefix("instances_")
        return (
            folder == self._annotations.parent
            or name in (*IMAGE_FOLDERS, own)
            or SPLITS.get(name.rstrip("0123456789")) == self._split
        )

    @cached_property
    def _has_own_folder(self) -> bool:
        """Whether images lie in a folder named as the split."""
        folders = {folder for places in self._places for folder in places.holding_images()}
        return any(split_of(one) == self._split for folder in folders for one in Path(self.relative(folder)).parts)

    @cached_property
    def _versions(self) -> dict[Path, bool]:
        return {}

    @cached_property
    def _listings(self) -> dict[Path, set[str]]:
        return {}

    @cached_property
    def _depths(self) -> dict[Path, int | None]:
        """Folder -> `_depth` of its files."""
        return {}


class _Places:
    """The image files below folders, by name."""

    def __init__(self, folders: Sequence[Path], follow_links: bool) -> None:
        self.folders, self._follow_links = folders, follow_links

    def of_name(self, parts: Sequence[str]) -> list[Path]:
        """The files with the last part of a name, in the first spelling in which there are some."""
        if not parts:
            return []
        key = _key(parts[-1])
        found = self._by_name.get(parts[-1]) or self._by_key.get(key) or []
        if not found and not key.endswith(SUFFIXES):  # masks are often named a.jpg.png
            found = self._by_stem.get(key, [])
        return found

    def holding_images(self) -> set[Path]:
        """The folders that image files are in."""
        return {path.parent for paths in self._by_name.values() for path in paths}

    def by_shared_folders(self, parts: Sequence[str]) -> Iterator[list[Path]]:
        """The files with the last part of a name in groups, the first of which share the most of its last folders; the
        last group are all files.
        """
        groups, end = [self.of_name(parts)], tuple(parts[-1:])
        for folder in reversed(parts[:-1]):
            if len(groups[-1]) < 2:
                break
            if end not in self._by_folder:
                inside: dict[str, list[Path]] = {}
                for path in groups[-1]:
                    inside.setdefault("".join(map(_key, path.parts[-len(end) - 1 : -len(end)])), []).append(path)
                self._by_folder[end] = inside
            groups.append(self._by_folder[end].get(_key(folder), []))
            end = (_key(folder), *end)
        yield from reversed(groups)

    @cached_property
    def _by_folder(self) -> dict[tuple[str, ...], dict[str, list[Path]]]:
        """End of a path -> the files with this end by the key of the folder before it."""
        return {}

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for folder in self.folders:
            for path in image_paths(folder, self._follow_links):
                found.setdefault(path.name, []).append(path)
        return found

    @cached_property
    def _by_key(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for name, paths in self._by_name.items():
            found.setdefault(_key(name), []).extend(paths)
        return found

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        """As `_by_key`, by the names without their endings."""
        found: dict[str, list[Path]] = {}
        for key, paths in self._by_key.items():
            found.setdefault(key.rpartition(".")[0], []).extend(paths)
        return found


def outermost(folders: Iterable[Path]) -> list[Path]:
    """The folders that lie in none of the others."""
    found = set(folders)
    return sorted(folder for folder in found if not found.intersection(folder.parents))


def image_paths(folder: Path, follow_links: bool = False) -> Iterator[Path]:
    """The image files below a folder, in no order, without links and hidden folders."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not is_hidden(path) and (follow_links or not path.is_symlink()):
                yield path


def usual_name(image: dict[str, Any]) -> str | None:
    """The name of an image entry: its `file_name`, or else a URL as in LVIS."""
    names = (image.get(key) for key in ("file_name", "filename", "coco_url", "path"))
    return next((name for name in names if isinstance(name, str) and name), None)


def without_server(image: dict[str, Any]) -> dict[str, Any]:
    """The image entry with the path itself where its `file_name` is that of a file in Label Studio's local storage."""
    name = image.get("file_name")
    if not isinstance(name, str) or _LABEL_STUDIO not in name:
        return image
    return {**image, "file_name": unquote(name.partition(_LABEL_STUDIO)[2])}


def _parts(name: str) -> tuple[str, ...]:
    """Folders and name of a file name, a path of another machine or a URL; () for one that leads out of its folder."""
    name = path_elsewhere(name) or name
    if is_address(name):
        try:
            parts = [part for part in unquote(urlsplit(name).path).split("/") if part]
        except ValueError:
            return ()
        return tuple(parts) if parts and is_inside("/".join(parts)) else ()
    return PurePosixPath(name).parts if is_inside(name) and len(name) < 4096 else ()


@lru_cache(maxsize=1 << 16)
def _key(name: str) -> str:
    """A key that is equal for names that differ in percent-encoding, Unicode form, case or surrounding spaces."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(unquote(name))).casefold()).strip()


def _shared_folders(path: Path, parts: Sequence[str]) -> int:
    """How many of the last folders a file and a name have in common, in any spelling."""
    count = 0
    for one, other in zip(reversed(path.parts[:-1]), reversed(parts[:-1]), strict=False):
        if _key(one) != _key(other):
            break
        count += 1
    return count


def files_differ(first: Path, second: Path) -> bool:
    """Whether two files have other content; what isn't a file counts as the same."""
    try:
        if not (first.is_file() and second.is_file()) or os.path.samefile(first, second):  # noqa: PTH121
            return False
        return first.stat().st_size != second.stat().st_size or first.read_bytes() != second.read_bytes()
    except OSError:
        return False
