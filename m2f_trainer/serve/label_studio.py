"""Label Studio's protocol for ML backends: drafts of annotations as people open tasks.

Label Studio sends tasks and the labelling configuration of a project, and gets regions, as brush masks or polygons.
An image is part of the task (a `data:` URI) or is read from one Label Studio server that the user has named. No other
address, and no file, is opened.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.errors import DataError, ImageError, RecipeError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.results import polygons_of
from m2f_trainer.masks.polygons import simplify

TAGS = {"BrushLabels": "brushlabels", "PolygonLabels": "polygonlabels"}
"""The control tags that are answered, and the type of their regions."""

TOLERANCE = 1.0
"""How far, in pixels, a simplified polygon may be from the edge of its mask."""

PLACES = ("/data/", "/storage-data/", "/tasks/")
"""Where Label Studio serves the images of tasks: uploads and local files, its storage, and its proxy of clouds."""

_SECONDS = 30  # of one request to Label Studio


@dataclass(frozen=True)
class Control:
    """The tag of a labelling configuration that regions belong to.

    Attributes:
        kind: brushlabels or polygonlabels.
        from_name: the name of the tag.
        to_name: the name of the image's tag.
        key: the key of the image in a task's data.
        labels: category id -> label, for the classes of the model that have one.
    """

    kind: str
    from_name: str
    to_name: str
    key: str
    labels: Mapping[int, str]


def find_control(config: str, names: Mapping[int, str]) -> Control:
    """The first tag BrushLabels or PolygonLabels of a labelling configuration.

    A class belongs to the label with its name as `value` or `alias`, or among the comma-separated names of
    `predicted_values`, as in Label Studio's own backends.

    Args:
        config: the XML of the project.
        names: category id -> name of the model.

    Raises:
        DataError: it is no such configuration, or none of its labels is a class.
    """
    if "<!DOCTYPE" in config or "<!ENTITY" in config:  # entities can expand to any size
        raise DataError("label config: expected XML without DOCTYPE and ENTITY. Remove them.")
    try:
        root = ElementTree.fromstring(config)
    except (ElementTree.ParseError, UnicodeEncodeError) as error:  # JSON can hold text that is no Unicode
        raise DataError(f"label config: expected XML, got an error at {error}.") from error
    images = {tag.get("name", ""): tag.get("value", "") for tag in root.iter("Image")}
    tag = next((tag for tag in root.iter() if tag.tag in TAGS and tag.get("toName") in images), None)
    if tag is None:
        raise DataError(
            'label config: expected <Image name="image" value="$image"/> and <BrushLabels> or <PolygonLabels> with '
            'toName="image", found none. Add one with the labels of your classes.'
        )
    key = images[tag.get("toName", "")]
    if not key.startswith("$") or len(key) < 2:
        raise DataError(f'label config: expected value="$key" in <Image>, got {key!r}. Several pages are not read.')
    by_name: dict[str, str] = {}
    for label in tag.iter("Label"):
        value = label.get("value", "")
        shown = label.get("alias") or value
        for name in (value, shown, *label.get("predicted_values", "").split(",")):
            by_name.setdefault(name.strip(), shown)
    labels = {category: by_name[name] for category, name in names.items() if name in by_name}
    if not labels:
        raise DataError(
            f"label config: expected labels named as the model's classes ({', '.join(names.values())}), found "
            f'{", ".join(sorted(filter(None, by_name)))}. Rename them, or add predicted_values="CLASS" to a <Label>.'
        )
    return Control(TAGS[tag.tag], tag.get("name", ""), tag.get("toName", ""), key[1:], labels)


def prediction(instances: Instances, control: Control, version: str) -> dict[str, Any]:
    """A prediction as Label Studio stores it: a region for each instance, or for each part of it as polygons.

    Instances of classes without a label are left out. The score is the mean of the regions' scores.
    """
    regions = [
        region
        for index, category in enumerate(instances.category_ids.tolist())
        if category in control.labels
        for region in _regions(instances, index, control)
    ]
    scores = [region["score"] for region in regions]
    return {"result": regions, "score": float(np.mean(scores)) if scores else 0.0, "model_version": version}


def _regions(instances: Instances, index: int, control: Control) -> list[dict[str, Any]]:
    height, width = instances.size
    if control.kind == "brushlabels":
        shapes: list[dict[str, Any]] = [{"format": "rle", "rle": brush_rle(instances.mask(index))}]
    else:
        entry = {"size": list(instances.size), "counts": instances.rles[index]["counts"]}
        parts = [np.reshape(simplify(part, TOLERANCE), (-1, 2)) for part in polygons_of(entry)]
        percent = np.array([100 / width, 100 / height])
        shapes = [{"points": (part * percent).tolist(), "closed": True} for part in parts if len(part) > 2]
    return [
        {
            "id": uuid.uuid4().hex[:10],  # unique among all predictions and annotations of a task
            "from_name": control.from_name,
            "to_name": control.to_name,
            "type": control.kind,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {**shape, control.kind: [control.labels[int(instances.category_ids[index])]]},
            "score": float(instances.scores[index]),
        }
        for shape in shapes
    ]


_FIELDS = np.array([3, 4, 8, 16])  # bits of a run's length


def brush_rle(mask: NDArray[np.uint8]) -> list[int]:
    """A mask as Label Studio stores brush strokes: run lengths of its RGBA picture, as a list of bytes.

    The format is that of @thi.ng/rle-pack, most significant bit first: the number of values (32 bits), the bits of a
    value less one (5), and the bits of the four kinds of lengths less one (4 each); then for each run a one, the
    kind of its length (2 bits), its length less one, and its value (8 bits).

    Args:
        mask: (H, W) of zeros and ones.
    """
    flat = mask.reshape(-1)  # row-major
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(starts, append=len(flat))  # four channels
    longest = 2 ** int(_FIELDS[-1])
    pieces = -(-lengths // longest)
    values = np.repeat(255 * flat[starts].astype(np.int64), pieces)
    ends = np.cumsum(pieces) - 1
    rest = np.full(len(values), longest)
    rest[ends] = lengths - longest * (pieces - 1)
    kinds = np.searchsorted(2**_FIELDS, rest)
    fields = _FIELDS[kinds]
    codes = ((((4 + kinds) << fields) | (rest - 1)) << 8) | values
    head = _bits(np.array([4 * len(flat), 7, *(_FIELDS - 1)]), np.array([32, 5, 4, 4, 4, 4]))
    packed: list[int] = np.packbits(np.concatenate([head, _bits(codes, 11 + fields)])).tolist()
    return packed


def _bits(numbers: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bits of numbers of different widths, one number after the other, most significant bit first."""
    ends = np.cumsum(widths)
    places = np.repeat(ends, widths) - np.arange(ends[-1]) - 1  # of each bit in its number, from the right
    return ((np.repeat(numbers, widths) >> places) & 1).astype(np.uint8)


class ImageReader:
    """Reads the images of tasks.

    Args:
        url: the address of the only Label Studio server that is asked, or None.
        token: its access token: a legacy token, or a personal access token (a JWT that is exchanged for others).
        limit: most bytes of an image.

    Raises:
        RecipeError: `url` is no address, or `token` is missing.
    """

    def __init__(self, url: str | None = None, token: str | None = None, limit: int = 2**25) -> None:
        self.limit, self._token, self._access = limit, token or "", ""
        self._base = urlsplit((url or "").rstrip("/"))
        if url and (self._base.scheme not in ("http", "https") or not self._base.hostname):
            raise RecipeError(f"--label_studio_url: expected an address such as http://localhost:8080, got {url!r}.")
        if url and not token:
            raise RecipeError(
                "--label_studio_url needs an access token of Label Studio in the environment variable "
                "LABEL_STUDIO_API_KEY (Account & Settings > Access Token)."
            )

    def read(self, task: Mapping[str, Any], key: str) -> bytes:
        """The image file of a task.

        Raises:
            ImageError: the task has no image, or it is at an address that is not read.
        """
        data = task.get("data")
        address = data.get(key) if isinstance(data, Mapping) else None
        where = f"task {task.get('id')}"
        if not isinstance(address, str) or not address:
            raise ImageError(f"{where}: expected the address of an image under {key!r} of its data, found none.")
        if address.startswith("data:"):
            return _bytes_of_data_uri(address, where)
        return self._fetch(self._path_of(address, where), f"{where}, {address[:200]}")

    def _path_of(self, address: str, where: str) -> str:
        """The path and query of an image on the Label Studio server, for addresses of tasks only.

        Raises:
            ImageError: it is elsewhere.
        """
        if not self._base.netloc:
            raise ImageError(
                f"{where}: the image is at {address[:200]}, and this server opens no addresses. Start it with "
                "--label_studio_url, or import images as data: URIs."
            )
        try:
            parts = urlsplit(f"/data/{address}" if address.startswith("upload/") else address)
        except ValueError as error:
            raise ImageError(
                f"{where}: expected an address, got {address[:200]} ({error}). Correct the task."
            ) from error
        base, path = self._base.path, parts.path
        if parts.netloc or parts.scheme:
            foreign = (parts.scheme, parts.netloc) != (self._base.scheme, self._base.netloc)
        else:
            foreign, path = False, path if base and path.startswith(f"{base}/") else base + path
        below = unquote(path[len(base) :]) if path.startswith(base) else ""
        if foreign or ".." in below or "\\" in below or not below.startswith(PLACES) or not address.isprintable():
            raise ImageError(
                f"{where}: expected an image of {self._base.geturl()} below {', '.join(PLACES)}, got {address[:200]}. "
                "Images elsewhere are not opened: upload them to Label Studio, or let it proxy its storage."
            )
        return quote(path + (f"?{parts.query}" if parts.query else ""), safe="/%?=&+~:;,@!$'()*")

    def _fetch(self, path: str, where: str) -> bytes:
        status, content = self._request("GET", path, where)
        if status == 401 and self._is_personal:  # the access token has expired
            self._access = ""
            status, content = self._request("GET", path, where)
        if status != 200:
            advice = "Redirects are not followed: let Label Studio proxy its storage (no pre-signed URLs)."
            raise ImageError(
                f"{where}: expected the image, Label Studio answered with status {status}. "
                + (advice if 300 <= status < 400 else "Check LABEL_STUDIO_API_KEY and the task.")
            )
        return content

    @property
    def _is_personal(self) -> bool:
        return self._token.count(".") == 2  # a JWT

    def _authorization(self, where: str) -> str:
        if not self._is_personal:
            return f"Token {self._token}"
        if not self._access:
            body = json.dumps({"refresh": self._token}).encode()
            status, content = self._send("POST", f"{self._base.path}/api/token/refresh/", where, body, {})
            try:
                self._access = str(json.loads(content)["access"])
            except (ValueError, KeyError, TypeError) as error:
                raise ImageError(
                    f"{where}: Label Studio refused the token in LABEL_STUDIO_API_KEY (status {status}). Renew it."
                ) from error
        return f"Bearer {self._access}"

    def _request(self, method: str, path: str, where: str) -> tuple[int, bytes]:
        return self._send(method, path, where, None, {"Authorization": self._authorization(where)})

    def _send(
        self, method: str, path: str, where: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """The status and content of an answer; no redirect is followed."""
        kind = http.client.HTTPSConnection if self._base.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._base.hostname or "", self._base.port, timeout=_SECONDS)
        try:
            kinds = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body, {**headers, **kinds})
            answer = connection.getresponse()
            content = answer.read(self.limit + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(f"{where}: Label Studio at {self._base.geturl()} can't be read ({error}).") from error
        finally:
            connection.close()
        if len(content) > self.limit:
            raise ImageError(f"{where}: expected an image of at most {self.limit:,} bytes.")
        return answer.status, content


def _bytes_of_data_uri(address: str, where: str) -> bytes:
    head, comma, content = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"{where}: expected data:image/...;base64, before an image in a data: URI, got {head[:60]!r}.")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{where}: the base64 of its data: URI is damaged ({error}).") from error
