"""Malformed datasets and images with one fault each, and a runner that tries each in its own process with a time limit.

Run as a module it reads cases as JSON lines `[kind, argument]` and writes `[outcome, message]` for each. It imports
everything once, then forks for each case, so that a crash or a hang affects only that case.
"""

import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.folders import annotation, content, write

LIMIT = 5.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # seconds, more on a busy machine

SEGMENTATIONS: dict[str, Any] = {
    "null": None,
    "a number": 3,
    "text": "1,2,3,4,5,6",
    "true": True,
    "an empty list": [],
    "an empty object": {},
    "an empty part": [[]],
    "one point": [[1, 2]],
    "two points": [[1, 2, 3, 4]],
    "an odd number of values": [[1, 2, 3, 4, 5, 6, 7]],
    "nan first": [[float("nan"), 2, 3, 4, 5, 6]],
    "nan last": [[1, 2, 3, 4, 5, float("nan")]],
    "inf": [[1, 2, float("inf"), 4, 5, 6]],
    "minus inf": [[1, 2, float("-inf"), 4, 5, 6]],
    "null inside": [[1, 2, None, 4, 5, 6]],
    "text inside": [[1, 2, "3", 4, 5, 6]],
    "a boolean inside": [[1, 2, True, 4, 5, 6]],
    "a list inside": [[1, 2, [3], 4, 5, 6]],
    "1e8": [[1, 2, 1e8, 4, 5, 6]],
    "minus 1e8": [[1, 2, -1e8, 4, 5, 6]],
    "1e300": [[1, 2, 1e300, 4, 5, 6]],
    "a number of 400 digits": [[1, 2, 10**400, 4, 5, 6]],
    "a bad part after a good one": [[2, 3, 12, 3, 12, 11], [1, 2, float("nan"), 4, 5, 6]],
    "an object among the parts": [[2, 3, 12, 3, 12, 11], {"a": 1}],
    "shares of the sides": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.8]],
    "rle of another size": {"size": [20, 16], "counts": [300, 20]},
    "rle without size": {"counts": [300, 20]},
    "rle without counts": {"size": [16, 20]},
    "rle of size 0": {"size": [0, 5], "counts": []},
    "rle of a giant size": {"size": [200_000, 200_000], "counts": [40_000_000_000]},
    "rle of 2 ** 32 + 4": {"size": [2**32 + 4, 1], "counts": [4]},
    "rle of a negative size": {"size": [-16, -20], "counts": [320]},
    "rle of a text size": {"size": "16x20", "counts": [320]},
    "counts too short": {"size": [16, 20], "counts": [10, 20]},
    "counts too long": {"size": [16, 20], "counts": [300, 200]},
    "counts empty": {"size": [16, 20], "counts": []},
    "counts negative": {"size": [16, 20], "counts": [340, -20]},
    "counts fractional": {"size": [16, 20], "counts": [299.5, 20.5]},
    "counts of text": {"size": [16, 20], "counts": ["300", "20"]},
    "counts with null": {"size": [16, 20], "counts": [300, None, 20]},
    "counts with true": {"size": [16, 20], "counts": [319, True]},
    "counts huge": {"size": [16, 20], "counts": [10**30]},
    "counts past 64 bits": {"size": [16, 20], "counts": [2**63, 2**63, 320]},
    "counts null": {"size": [16, 20], "counts": None},
    "counts a number": {"size": [16, 20], "counts": 320},
    "counts an object": {"size": [16, 20], "counts": {"0": 320}},
    "string empty": {"size": [16, 20], "counts": ""},
    "string cut": {"size": [16, 20], "counts": "\\"},
    "string with spaces": {"size": [16, 20], "counts": "  "},
    "string with NUL": {"size": [16, 20], "counts": "0\0"},
    "string beyond ascii": {"size": [16, 20], "counts": "é"},
    "string that never ends": {"size": [16, 20], "counts": "o" * 50_000},
    "string of zeros": {"size": [16, 20], "counts": "0" * 50_000},
    "string of another image": {"size": [16, 20], "counts": "PPYo1"},
    "string negative": {"size": [16, 20], "counts": "Z2"},
}


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(form: str, size: tuple[int, int] = (20, 16), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


def array(values: np.ndarray, form: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


IMAGES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\xff",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a web page": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "text": lambda: b"hello",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\nshowpage\n",
    "a pdf": lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="16"/>',
    "a zip": lambda: b"PK\x03\x04" + bytes(60),
    "noise": lambda: np.random.default_rng(1).integers(0, 255, 500, dtype=np.uint8).tobytes(),
    "a png header alone": lambda: b"\x89PNG\r\n\x1a\n",
    "png cut": lambda: saved("PNG")[:-300],
    "png with a wrong checksum": lambda: flipped(saved("PNG"), 30),
    "png with damaged data": lambda: png(20, 16, b"\x78\x9cnonsense"),
    "png without data": lambda: png(20, 16),
    "png of no width": lambda: png(0, 16),
    "png bomb": lambda: png(60_000, 60_000, zlib.compress(bytes(1000)), 1, 0),
    "png of 2 ** 31": lambda: png(2**31 - 1, 2**31 - 1),
    "png of another size": lambda: saved("PNG", (21, 16)),
    "png turned": lambda: saved("PNG", (16, 20)),
    "jpeg cut": lambda: saved("JPEG", quality=95)[:-400],
    "jpeg header alone": lambda: saved("JPEG")[:200],
    "jpeg markers only": lambda: b"\xff\xd8\xff\xd9",
    "webp cut": lambda: saved("WEBP")[:60],
    "gif header alone": lambda: b"GIF89a" + struct.pack("<HHBBB", 20, 16, 0, 0, 0),
    "bmp cut": lambda: saved("BMP")[:100],
    "bmp bomb": lambda: saved("BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + saved("BMP")[26:],
    "tiff cut": lambda: saved("TIFF")[:40],
    "tiff of floats": lambda: array(np.ones((16, 20), dtype=np.float32)),
    "tiff of 32 bits": lambda: array(np.full((16, 20), 70_000, dtype=np.int32)),
    "tiff of negatives": lambda: array(np.full((16, 20), -3, dtype=np.int32)),
    "tiff that points to itself": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "ppm bomb": lambda: b"P6 100000 100000 255\n",
    "ppm cut": lambda: b"P6 20 16 255\n\0\0\0",
    "ppm of no size": lambda: b"P6 0 0 255\n",
    "pgm with text for a size": lambda: b"P5 a b 255\n",
    "psd": lambda: b"8BPS\0\1" + bytes(40),
    "icns": lambda: b"icns\0\0\0\x10" + bytes(8),
    "fits": lambda: b"SIMPLE  =                    T" + bytes(80),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a pipe": pipe,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("gone.png")),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link out": lambda path: path.symlink_to("/etc/hostname"),
    "a link to a pipe": lambda path: (pipe(path.with_name("pipe")), path.symlink_to(path.with_name("pipe"))),
}

NAMES: dict[str, str] = {
    "parent": "../a.png",
    "grandparent": "../../a.png",
    "parent inside": "x/../../a.png",
    "parent back in": "x/../a.png",
    "only parent": "..",
    "parent with slash": "../",
    "doubled": "....//../a.png",
    "absolute": "/etc/hostname",
    "absolute doubled": "//etc/hostname",
    "root": "/",
    "device": "/dev/zero",
    "process": "/proc/self/environ",
    "standard input": "/dev/stdin",
    "nul": "a\0.png",
    "nul after": "a.png\0.jpg",
    "windows": "x\\a.png",
    "windows parent": "..\\a.png",
    "windows drive": "C:\\a.png",
    "windows share": "\\\\host\\share\\a.png",
    "windows drive with slash": "C:/../../a.png",
    "mixed": "x\\../a.png",
    "link": "link.png",
    "link to absolute": "absolute.png",
    "link in a folder": "out/a.png",
    "link chain": "chain.png",
    "link to parent": "up/set/train/../a.png",
    "home": "~/../../a.png/..",
    "dot parent": "./../a.png",
    "dots in the middle": "x/./.././../a.png",
    "device by link": "zero.png",
    "newline and parent": "a\n/../../b.png",
    "long parent": "x/" * 50 + "../" * 51 + "a.png",
}


def set_with(folder: Path, coco: object) -> Path:
    """A valid validation split, and a training split with this content."""
    write(folder, content(), split="valid")
    return write(folder, coco)


def with_segmentation(folder: Path, segmentation: object) -> Path:
    return set_with(folder, json.dumps(content(annotation(4711, segmentation=segmentation))))


def with_image(folder: Path, data: bytes) -> Path:
    root = set_with(folder, content())
    (root / "train/a.png").write_bytes(data)
    return root


def with_place(folder: Path, make: Callable[[Path], object]) -> Path:
    root = set_with(folder, content())
    (root / "train/a.png").unlink()
    make(root / "train/a.png")
    return root


def with_name(folder: Path, name: str) -> Path:
    root = set_with(folder, content(images=[{"id": 1, "file_name": name, "height": 16, "width": 20}]))
    (root / "a.png").write_bytes(saved("PNG"))
    train = root / "train"
    (train / "x").mkdir()
    (train / "link.png").symlink_to(root / "a.png")
    (train / "absolute.png").symlink_to("/etc/hostname")
    (train / "chain.png").symlink_to(train / "link.png")
    (train / "zero.png").symlink_to("/dev/zero")
    (train / "out").symlink_to(root)
    (train / "up").symlink_to(root.parent)
    return root


# running


def try_dataset(root: str) -> None:
    """Load and check the dataset as a training run does."""
    from m2f_trainer.data.dataset import load_coco
    from m2f_trainer.data.validate import check_dataset

    check_dataset(load_coco(root, cache_dir=Path(root).with_name("cache")))


def try_check(root: str) -> None:
    """Run `m2f check`; its text is the message."""
    from m2f_trainer.doctor.examine import examine
    from m2f_trainer.doctor.summary import summary_text
    from m2f_trainer.errors import DataError

    examination = examine(root)
    if examination.status:
        raise DataError(summary_text(examination))


def try_recipe(argv: list[str]) -> None:
    from m2f_trainer.config.recipe import load_recipe

    load_recipe(argv)


TRIES: dict[str, Callable[[Any], None]] = {"dataset": try_dataset, "check": try_check, "recipe": try_recipe}


def run(cases: list[tuple[str, object]]) -> Iterator[tuple[str, str]]:
    """(outcome, message) of each case: refused, accepted, broken (another exception), hung, or signal N."""
    work = subprocess.run(
        [sys.executable, "-m", "tests.data.corpus"],
        input="\n".join(map(json.dumps, cases)),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    for line in work.stdout.splitlines():
        outcome, message = json.loads(line)
        yield outcome, message


def fork(kind: str, argument: object) -> tuple[str, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.write(writing, json.dumps(attempt(kind, argument)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    answer, end = b"", time.monotonic() + LIMIT
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reading, 65536)
        if not part:
            break
        answer += part
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        return "hung", ""
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}", ""
    outcome, message = json.loads(answer)
    return outcome, message


def attempt(kind: str, argument: object) -> tuple[str, str]:
    from m2f_trainer.errors import M2FError

    try:
        TRIES[kind](argument)
    except M2FError as error:
        return "refused", str(error)[:12_000]
    except BaseException as error:
        return "broken", f"{type(error).__name__}: {error}"[:2000]
    return "accepted", ""


def main() -> None:
    cases = [json.loads(line) for line in sys.stdin]
    import m2f_trainer.data.validate
    import m2f_trainer.doctor.summary

    if any(kind == "recipe" for kind, _ in cases):
        import m2f_trainer.config.recipe  # noqa: F401

    for kind, argument in cases:
        sys.stdout.write(json.dumps(fork(kind, argument)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
