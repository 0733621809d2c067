"""The HTTP interface of `m2f serve`: images in, instances out; health, metrics and limits."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2f_trainer.errors import M2FError, printable
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Frame, Predictor
from m2f_trainer.serve.answers import NAME, Format, check_image, coco_results, overlay_picture, polygon_results
from m2f_trainer.serve.batching import Batcher, Threshold
from m2f_trainer.serve.label_studio import Control, ImageReader, find_control, prediction
from m2f_trainer.serve.metrics import Metrics
from m2f_trainer.version import __version__
from m2f_trainer.viz.html import render_page

logger = logging.getLogger(__name__)
T = TypeVar("T")
BODY_SECONDS = 60
"""The time in which a client has to send its request."""

GONE_SECONDS = 0.5
"""How often it is asked whether the client of an image that waits or is predicted is still there."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


PARAMETERS = ("format", "image_id", "threshold")
"""The query parameters of `/instances`."""


@dataclass(frozen=True)
class ServeOptions:
    """Limits and defaults of a server.

    name        what `/health` calls the model
    threshold   minimum score of an instance where a request gives none
    batch_size  most images of a batch
    max_wait    seconds that an image waits for others
    max_open    most requests that are received, wait, or are answered at the same time; further ones get status 503
    max_bytes   most bytes of a request
    hosts       the host names under which browsers may reach the server; None for any
    reader      reads the images of Label Studio's tasks
    """

    name: str
    threshold: Threshold = "auto"
    batch_size: int = 4
    max_wait: float = 0.02
    max_open: int = 64
    max_bytes: int = 2**25
    hosts: frozenset[str] | None = LOOPBACK
    reader: ImageReader = field(default_factory=ImageReader)


class Service:
    """A model with its queue, its metrics, and the number of open requests."""

    def __init__(self, predictor: Predictor, options: ServeOptions) -> None:
        self.predictor, self.options, self.metrics, self.opened = predictor, options, Metrics(), 0
        self.batcher = Batcher(
            predictor,
            batch_size=options.batch_size,
            max_wait=options.max_wait,
            observe=self.metrics.count_batch,
        )
        self.metrics.watch(lambda: self.batcher.waiting, lambda: self.opened)
        self._decoders = ThreadPoolExecutor(2, "images")  # a huge image delays others little; each takes much memory
        self._writer = ThreadPoolExecutor(1, "answers")  # one at a time: a picture takes much memory

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as open.

        Raises:
            HTTPException: 503, too many are open.
        """
        if self.opened >= self.options.max_open:
            seconds = max(1, math.ceil(self.batcher.waiting * self.batcher.seconds_per_image))
            raise HTTPException(
                503,
                f"Expected at most {self.options.max_open} open requests. Try again in {seconds} s.",
                {"Retry-After": str(seconds)},
            )
        self.opened += 1
        try:
            yield
        finally:
            self.opened -= 1

    async def predict(self, request: Request, image: bytes, threshold: Threshold, overlay: bool = False) -> Instances:
        """The instances of an image file, which came with `request`.

        Raises:
            M2FError: the image can't be used.
            ClientDisconnect: the client has gone; its image is given up.
            HTTPException: 500, the model failed.
        """
        await asyncio.to_thread(check_image, image, overlay)
        given: bytes | Frame = image
        try:
            if self.predictor.tiling is None:  # the tiles of an image are read as the model gets to them
                given = await self._in(self._decoders, self.predictor.whole_frame, image, NAME)
            return await unless_gone(request, asyncio.wrap_future(self.batcher.submit(given, threshold)))
        except (M2FError, ClientDisconnect):
            raise
        except Exception as error:
            raise HTTPException(500, f"The model failed ({type(error).__name__}); see the server's log.") from error

    async def write(self, function: Callable[..., T], *values: Any) -> T:
        """The result of a function that makes an answer, in a thread of its own."""
        return await self._in(self._writer, function, *values)

    async def _in(self, threads: ThreadPoolExecutor, function: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *values)

    def close(self) -> None:
        """Answer what is in the queue and stop."""
        self._decoders.shutdown()
        self.batcher.close()
        self._writer.shutdown()


def create_app(predictor: Predictor, options: ServeOptions) -> FastAPI:
    """The application; `predictor` is its own until it is shut down."""
    service = Service(predictor, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="m2f serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, service=service)
    _add_error_answers(app)

    @app.post("/instances", response_class=Response)
    async def instances(
        request: Request,
        format: Format = "coco",
        threshold: Annotated[float, Query(ge=0, le=1)] | Literal["auto"] | None = None,
        image_id: int = 0,
    ) -> Response:
        """The instances of one image, which is the body itself or the only file of a form."""
        with service.admitted():
            unknown = ", ".join(sorted(request.query_params.keys() - PARAMETERS))
            if unknown:
                raise HTTPException(400, f"Expected the parameters {', '.join(PARAMETERS)}, got {unknown[:100]}.")
            image = await read_image(request, options.max_bytes)
            lowest = options.threshold if threshold is None else threshold
            found = await service.predict(request, image, lowest, overlay=format == "overlay")
            names = predictor.names
            if format == "overlay":
                picture = await service.write(overlay_picture, image, found, names, predictor.pixel_range)
                return Response(picture, media_type="image/jpeg")
            written = (
                service.write(polygon_results, found, names)
                if format == "polygons"
                else service.write(coco_results, found, image_id)
            )
            return Response(await written, media_type="application/json")

    model = {
        "model": options.name,
        "categories": [{"id": key, "name": name} for key, name in predictor.names.items()],
        "thresholds": predictor.thresholds(),
    }
    page = render_page(
        "serve.html",
        script="serve.js",
        requests=True,
        title=options.name,
        classes=", ".join(predictor.names.values()),
        model=json.dumps(model),
    )

    @app.get("/", response_class=HTMLResponse)
    async def try_it() -> HTMLResponse:
        """A page that shows the instances of an image; its policy is in it."""
        return HTMLResponse(page, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether images are predicted, and what the model is; also for Label Studio."""
        alive = service.batcher.alive
        state = {"status": "UP" if alive else "DOWN", "model_class": "m2f_trainer", "version": __version__}
        return JSONResponse({**state, **model}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_label_studio(app, service)
    return app


def _add_label_studio(app: FastAPI, service: Service) -> None:
    """Label Studio's protocol for ML backends (its package label-studio-ml), besides `/health`."""
    options, version = service.options, {"model_version": service.options.name}

    @app.post("/setup")
    async def setup(request: Request) -> dict[str, Any]:
        """Check the labelling configuration of a project that is connected. Its host and token are not used."""
        config = (await _read_json(request, options.max_bytes)).get("schema")
        if config:
            control = _control(config)
            missing = [name for key, name in service.predictor.names.items() if key not in control.labels]
            if missing:
                logger.warning("Label Studio: classes without a label are left out: %s.", ", ".join(missing))
        return version

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """Predictions of tasks; a task whose image can't be used has an `error` and no `result`.

        Label Studio logs the error and stores no prediction, so that it asks again when the image has been replaced.
        """
        with service.admitted():
            content = await _read_json(request, options.max_bytes)
            control, tasks, results = _control(content.get("label_config")), content.get("tasks"), []
            if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
                raise HTTPException(400, "tasks: expected a list of objects.")
            for start in range(0, len(tasks), options.batch_size):  # so many images are in memory
                drafts = (draft(request, task, control) for task in tasks[start : start + options.batch_size])
                results += await asyncio.gather(*drafts)
            if results and all("error" in result for result in results):
                raise HTTPException(400, results[0]["error"])
            return {"results": results, **version}

    async def draft(request: Request, task: dict[str, Any], control: Control) -> dict[str, Any]:
        try:
            image = await asyncio.to_thread(options.reader.read, task, control.key)
            found = await service.predict(request, image, options.threshold)
        except M2FError as error:
            where, reason = f"task {task.get('id')}", str(error)
            reason = printable(reason if reason.startswith(where) else f"{where}: {reason}")
            logger.warning("Label Studio: %s", reason)
            return {"error": reason}
        return await service.write(prediction, found, control, options.name)

    def _control(config: object) -> Control:
        if not isinstance(config, str):
            raise HTTPException(400, "label config: expected the XML of a labelling configuration.")
        return find_control(config, service.predictor.names)

    @app.post("/webhook")
    async def webhook(request: Request) -> dict[str, Any]:
        """Events of a project are ignored: the model doesn't train here."""
        await read_body(request, options.max_bytes)
        return {"status": "ignored", **version}

    @app.api_route("/versions", methods=["GET", "POST"])
    async def versions(request: Request) -> dict[str, Any]:
        """The only version of the model."""
        await read_body(request, options.max_bytes)
        return {"versions": [options.name]}


async def _read_json(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object that Label Studio sends.

    Raises:
        HTTPException: 400, it is something else; 408 and 413, as of `received`.
    """
    try:
        content = await asyncio.to_thread(json.loads, await read_body(request, limit))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "Expected JSON of Label Studio. Send images to /instances.") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "Expected a JSON object of Label Studio. Send images to /instances.")
    return content


class Gate:
    """ASGI middleware: checks the host, adds headers of security, answers unexpected errors, and counts answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_missing_headers(message)
            await send(message)

        app = self.app if self._is_own_host(scope) else _WRONG_HOST
        try:
            await app(scope, receive, watched)
        except Exception as error:
            if status:  # the answer has begun: uvicorn logs the error and closes the connection
                raise
            logger.exception("%s %r failed.", scope["method"], scope["path"])
            reason = f"The request failed ({type(error).__name__}); see the server's log."
            await JSONResponse({"detail": reason}, 500)(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.metrics.count(path, status, time.perf_counter() - started)

    def _is_own_host(self, scope: Scope) -> bool:
        """Whether a browser reached the server by a name that is its own.

        Otherwise a page of another site, whose name leads to this machine (DNS rebinding), could read the answers.
        """
        hosts = self.service.options.hosts
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        try:
            return hosts is None or urlsplit(f"//{given}").hostname in hosts
        except ValueError:
            return False


_WRONG_HOST = JSONResponse(
    {"detail": "This server answers to its own names only, such as localhost. Start it with --host for others."}, 421
)
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


def _add_missing_headers(start: MutableMapping[str, Any]) -> None:
    """Add the headers of `_HEADERS` that an answer doesn't have yet."""
    given = {name.lower() for name, _ in start["headers"]}
    start["headers"] = [*start["headers"], *((name, value) for name, value in _HEADERS.items() if name not in given)]


def _add_error_answers(app: FastAPI) -> None:
    """Answer errors as JSON with the reason as `detail`, as FastAPI does for an HTTPException."""

    @app.exception_handler(M2FError)
    async def unusable(_: Request, error: M2FError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{one['loc'][1]}: {one['msg']}, got {one['input']!r}" for one in error.errors()]
        return JSONResponse({"detail": "; ".join(problems)}, 400)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody receives this


async def unless_gone(request: Request, found: asyncio.Future[T]) -> T:
    """The result of a future, which is cancelled once the client of `request` has gone.

    Raises:
        ClientDisconnect: the client has gone.
    """
    while not found.done():
        await asyncio.wait([found], timeout=GONE_SECONDS)
        if not found.done() and await request.is_disconnected():
            found.cancel()
            raise ClientDisconnect
    return found.result()


async def read_image(request: Request, limit: int) -> bytes:
    """The image of a request: its body, or the only file of a form (multipart/form-data).

    Raises:
        HTTPException: 400, there is no image; 408 and 413, as of `received`.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await read_body(request, limit)
    try:
        form = await FormInMemory(request.headers, received(request, limit), max_files=1, max_fields=10).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"Expected a form (multipart/form-data) with one file: {error.message}") from error
    try:
        files = [value for value in form.values() if not isinstance(value, str)]
        fields = [name for name, value in form.multi_items() if isinstance(value, str)]
        if not files:
            raise HTTPException(400, "Expected a form with a file, got none. With curl: -F image=@photo.jpg")
        if fields:
            raise HTTPException(
                400,
                f"Expected a form with a file only, got the field {', '.join(fields)[:100]}, too. Leave it out; "
                f"{', '.join(PARAMETERS)} are given in the address: ?threshold=0.5",
            )
        return await files[0].read()
    finally:
        await form.close()


class FormInMemory(MultiPartParser):
    """A form whose files stay in memory, where Starlette writes large ones to disk."""

    spool_max_size = 0  # no limit but that of the whole request


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises as `received`."""
    return b"".join([part async for part in received(request, limit)])


async def received(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The parts of a request's body as they arrive.

    Raises:
        HTTPException: 408, it takes more than `BODY_SECONDS`; 413, it has more than `limit` bytes.
    """
    too_large = HTTPException(413, f"Expected a request of at most {limit:,} bytes. --max_bytes raises the limit.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                yield part
    except TimeoutError as error:
        raise HTTPException(408, f"Expected the whole request within {BODY_SECONDS} s.") from error
