"""A small Hub on the loopback interface: as much of its API as an upload through huggingface_hub needs."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT, SLOW = 0, -1


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded in `files`; fails first as queued in `failures` for each path.

    A failure is a status; or CUT: the connection is closed in the midst of an answer; or SLOW: no answer comes for as
    long as the Hub stands.
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


class Handler(BaseHTTPRequestHandler):
    """One request; the paths are those of huggingface.co."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        self.server.bodies.append(body)
        self.server.tokens.add(self.headers.get("Authorization"))
        for part, statuses in self.server.failures.items():
            if part in path and statuses:
                failure = statuses.pop(0)
                if failure == CUT:
                    return self.cut()
                if failure == SLOW:
                    return self.stay_silent()
                return self.answer({"error": "queued failure"}, failure)
        return self.route(path, body)

    def stay_silent(self) -> None:
        """Answer nothing until the client is gone."""
        self.close_connection = True
        self.server.released.wait(30)

    def cut(self) -> None:
        """Promise an answer, send the half of it, and hang up."""
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
        """A file that was uploaded, as a download asks for it."""
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
        told = {"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40}
        proposed = "create_pr=1" in self.path
        self.answer(told | ({"pullRequestUrl": f"{self.server.address}/me/model/discussions/1"} if proposed else {}))

    def log_message(self, *_: object) -> None:
        """Quiet."""


def upload_mode(path: str) -> dict[str, object]:
    """The Hub's word on how a file is to be sent: weights by LFS."""
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
