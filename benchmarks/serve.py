"""Load test of `m2f serve` on the loopback interface: latency, memory, and whether every request is answered correctly.

python -m benchmarks.serve runs/first photos/ --requests 500 --clients 16

Of 20 requests, 15 are photos, two are files that are no image or are cut, one declares 30,000 x 30,000 pixels, one has
more bytes than are allowed, and one is a large photo (4000 x 3000). The clients are threads with one connection each. A
request that is sent away with status 503 is sent again after the time in Retry-After. The expected answer of a photo is
that of a first request for it, before the load.
"""

import argparse
import http.client
import io
import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MAX_BYTES = 2**23


@dataclass(frozen=True)
class Request:
    """A kind, a body, and the status of its answer."""

    kind: str
    body: bytes
    status: int


@dataclass(frozen=True)
class Outcome:
    """The answer to a request, or status 0 for none; seconds of the try that was answered; how often it was sent."""

    kind: str
    as_expected: bool
    status: int
    seconds: float
    tries: int


def main() -> None:
    """Start a server, load it, stop it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("photos", type=Path, help="folder of JPEG or PNG files")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max_open", type=int, default=64, help="as of m2f serve; lower than --clients to see 503")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "m2f_trainer", "serve", arguments.model, "--port", "0"]
    command += ["--max_open", str(arguments.max_open), "--max_bytes", str(MAX_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(re.findall(r":(\d+)/", server.stdout.readline())[0])
            report(arguments, port, server.pid)
            stopped = time.perf_counter()
            server.send_signal(signal.SIGTERM)
            status = server.wait(600)
            print(f"SIGTERM: exit status {status} after {time.perf_counter() - stopped:.1f} s")
        finally:
            server.kill()


def report(arguments: argparse.Namespace, port: int, pid: int) -> None:
    """Send the requests and print a table."""
    requests = mixture(sorted(arguments.photos.rglob("*.[jp][pn]g")), arguments.requests)
    expected = {body: send(port, body)[1] for body in {one.body for one in requests if one.status == 200}}
    memory, done = [resident(pid)], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            memory.append(resident(pid))

    watching = threading.Thread(target=watch)
    watching.start()
    started, cpu = time.perf_counter(), cpu_seconds(pid)
    with ThreadPoolExecutor(arguments.clients) as pool:
        outcomes = list(pool.map(lambda request: ask(port, request, expected.get(request.body)), requests))
    wall, cpu = time.perf_counter() - started, cpu_seconds(pid) - cpu
    done.set()
    watching.join()
    print(f"{len(outcomes)} requests, {arguments.clients} at a time: {wall:.1f} s, {cpu:.1f} CPU seconds of the server")
    print(f"answered as expected: {sum(one.as_expected for one in outcomes)} of {len(outcomes)}")
    again = sum(one.tries - 1 for one in outcomes)
    print(f"lost: {sum(one.status == 0 for one in outcomes)}; sent again after 503: {again}")
    print("| kind | requests | status | p50 s | p99 s |\n| --- | --- | --- | --- | --- |")
    for kind in sorted({one.kind for one in outcomes}):
        own = [one for one in outcomes if one.kind == kind]
        middle, high = np.percentile([one.seconds for one in own], [50, 99])
        statuses = ", ".join(f"{status}" for status in sorted(Counter(one.status for one in own)))
        print(f"| {kind} | {len(own)} | {statuses} | {middle:.3f} | {high:.3f} |")
    fifths = np.array_split(np.array(memory), 5)
    print("resident MB, maximum of each fifth of the time: " + ", ".join(f"{part.max() / 1e6:.0f}" for part in fifths))
    text = ask_text(port, "/metrics")
    batches, images = (float(re.findall(rf"m2f_batch_images_{name} (\S+)", text)[0]) for name in ("count", "sum"))
    print(f"images per batch: {images / batches:.2f}")


def mixture(photos: list[Path], count: int) -> list[Request]:
    """The requests of a load, in an order that is the same each time."""
    files = [path.read_bytes() for path in photos[:40]]
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (375, 500, 3), dtype=np.uint8)).resize((4000, 3000))
    large = io.BytesIO()
    noise.save(large, "JPEG", quality=85)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    special = [
        Request("no image", b"this is no image", 400),
        Request("cut JPEG or PNG", files[0][: len(files[0]) // 2], 400),
        Request("30,000 x 30,000 pixels", bomb, 400),
        Request("16 MB", bytes(2 * MAX_BYTES), 413),
        Request("4000 x 3000 pixels", large.getvalue(), 200),
    ]
    rounds = [
        [*special, *(Request("photo", files[(15 * number + k) % len(files)], 200) for k in range(15))]
        for number in range(-(-count // 20))
    ]
    requests = [request for one in rounds for request in one][:count]
    generator.shuffle(requests)  # type: ignore[arg-type]
    return requests


def ask(port: int, request: Request, expected: bytes | None) -> Outcome:
    """Send a request until it is answered with another status than 503."""
    for tries in range(1, 1000):
        started = time.perf_counter()
        try:
            status, body, again = send(port, request.body)
        except (OSError, http.client.HTTPException):
            return Outcome(request.kind, False, 0, time.perf_counter() - started, tries)
        if status != 503:
            break
        time.sleep(again)
    right = status == request.status and (close(body, expected) if expected else "detail" in json.loads(body))
    return Outcome(request.kind, right, status, time.perf_counter() - started, tries)


def close(answer: bytes, expected: bytes) -> bool:
    """Whether two answers have the same instances: masks differ by rounding between batches of different sizes."""
    found, truth = json.loads(answer), json.loads(expected)
    scores = [[entry["score"] for entry in one] for one in (found, truth)]
    return len(found) == len(truth) and bool(np.allclose(*scores, atol=1e-3))


def send(port: int, body: bytes) -> tuple[int, bytes, float]:
    """Status and body of an answer, and its Retry-After."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/instances", body)
        answer = connection.getresponse()
        return answer.status, answer.read(), float(answer.headers.get("Retry-After", 0))
    finally:
        connection.close()


def ask_text(port: int, path: str) -> str:
    """The body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def statistics(pid: int) -> Iterator[int]:
    """The numbers of /proc/PID/stat from the third field on."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return (int(word) for word in text.rpartition(")")[2].split()[1:])


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    numbers = list(statistics(pid))
    return (numbers[10] + numbers[11]) / 100


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return list(statistics(pid))[20] * 4096


if __name__ == "__main__":
    main()
