"""A server on the loopback interface, in this process, and a client."""

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from m2f_trainer.inference.predictor import Predictor
from tests.inference.test_predictor import BrightnessModel

for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(package, reason=f"the server needs {package}: pip install 'm2f-trainer[serve]'")

from m2f_trainer.serve.app import ServeOptions, create_app  # noqa: E402
from m2f_trainer.serve.server import uvicorn_server  # noqa: E402

OPTIONS = ServeOptions(name="tiny", threshold=0.0, max_wait=0.01)


class GatedModel(BrightnessModel):
    """A `BrightnessModel` whose batches wait until `gate` is set, and fail while `failures` are left."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.gate, self.failures = threading.Semaphore(0), threading.Event(), 0
        self.gate.set()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Mask2FormerForUniversalSegmentationOutput:
        self.started.release()
        assert self.gate.wait(60)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        return super().forward(pixel_values, pixel_mask)


def brightness() -> Predictor:
    """A predictor of bright areas."""
    return Predictor(GatedModel())  # type: ignore[arg-type]


def picture(height: int = 80, width: int = 60, left: int = 10) -> bytes:
    """A PNG file of a bright rectangle, 30 pixels wide, on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[20:60, left : left + 30] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Answer:
    """A status, headers with names in lower case, and a body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        return str(self.json["detail"])


def ask(port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """Send one request; a body that is an iterator is sent in chunks."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers or {}), encode_chunked=isinstance(body, Iterator))
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read())
    finally:
        connection.close()


def post(port: int, path: str, content: Any) -> Answer:
    """Send a JSON body."""
    return ask(port, "POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})


def form(content: bytes, name: str = "image", file_name: str | None = "a.png") -> tuple[bytes, dict[str, str]]:
    """A form with one part, as body and headers."""
    file = f'; filename="{file_name}"' if file_name else ""
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


@contextmanager
def running(predictor: Predictor, **options: Any) -> Iterator[int]:
    """A server of a predictor; its port."""
    server = uvicorn_server(create_app(predictor, replace(OPTIONS, **options)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
