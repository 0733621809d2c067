"""A small Hub on the loopback interface, with the part of its API that uploads through huggingface_hub need."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_canaryCanaryCanaryCanaryCanary"
CUT, SILENT, STALLED, HALF_HEARD, LATE, TRICKLE = 0, -1, -2, -3, -4, -5


class Hub(ThreadingHTTPServer):
    """Stores uploads in `files`; requests first fail as queued in `failures` by path.

    A failure is an HTTP status, or
    CUT         the connection is closed in the middle of a response
    SILENT      no response is sent until the Hub is closed
    STALLED     half of a response is sent, and nothing more
    HALF_HEARD  the connection is closed after half of the request's body was read
    LATE        the correct response, after a delay
    TRICKLE     the correct response, byte by byte
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, list[int]] = {}
        self.released = threading.Event()
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.private = False
        self.agreement: bytes | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


@contextmanager
def hub_of_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub in this process talks to, with `TOKEN`."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


class Handler(BaseHTTPRequestHandler):
    """One request; the paths are those of huggingface.co."""

    server: Hub
    protocol_version = "HTTP/1.1"

    fault: int | None = None

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.fault == LATE:
            time.sleep(0.3)
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        for part in self.parts(body) if self.command != "HEAD" else ():
            self.wfile.write(part)
            self.wfile.flush()

    def parts(self, body: bytes) -> Iterator[bytes]:
        """The parts of the body that are sent, according to the current fault."""
        if self.fault == STALLED:
            yield body[: len(body) // 2]
            self.stay_silent()
        elif self.fault == TRICKLE:
            for place in range(len(body)):
                time.sleep(0.002)
                yield body[place : place + 1]
        else:
            yield body

    def handle_one(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        self.fault = next(
            (queue.pop(0) for part, queue in self.server.failures.items() if part in path and queue), None
        )
        size = int(self.headers.get("Content-Length") or 0)
        if self.fault == HALF_HEARD:
            self.rfile.read(size // 2)
            self.close_connection = True
            return None
        body = self.rfile.read(size)
        self.server.bodies.append(body)
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.fault == CUT:
            return self.cut()
        if self.fault == SILENT:
            return self.stay_silent()
        if self.fault is not None and self.fault > 0:
            return self.answer({"error": "queued failure"}, self.fault)
        return self.route(path, body)

    def stay_silent(self) -> None:
        """Send nothing until the Hub is closed."""
        self.close_connection = True
        self.server.released.wait(30)

    def cut(self) -> None:
        """Announce a response of 1000 bytes, send one, and close the connection."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{")
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815 (the names that http.server calls)

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            return self.answer({"url": f"{self.server.address}/{name}", "name": name})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer({"files": [upload_mode(file["path"]) for file in files]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [self.ticket(one) for one in objects]})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            self.server.objects[path.removeprefix("/upload/")] = body
            return self.answer({})
        if "/commit/" in path:
            return self.commit(body)
        if path.endswith("/LICENSE.md") and self.server.agreement is not None:
            return self.answer(self.server.agreement, headers={"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        if "/resolve/" in path:
            return self.resolve(path.split("/resolve/")[1].split("/", 1)[1])
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").split("/revision")[0]
            return self.answer({"id": name, "private": self.server.private, "sha": "0" * 40, "siblings": []})
        return self.answer({"error": "not found"}, 404)

    def resolve(self, name: str) -> None:
        """Answer the download of an uploaded file."""
        if name not in self.server.files:
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        body = self.server.files[name]
        tag = hashlib.sha256(body).hexdigest()
        return self.answer(body, headers={"ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40})

    def ticket(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.server.address}/upload/{one['oid']}"}}}

    def commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        commit = {"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40}
        proposed = "create_pr=1" in self.path
        self.answer(commit | ({"pullRequestUrl": f"{self.server.address}/me/model/discussions/1"} if proposed else {}))

    def log_message(self, *_: object) -> None:
        """Quiet."""


def upload_mode(path: str) -> dict[str, object]:
    """The Hub's answer on how to upload a file: weights by LFS."""
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
