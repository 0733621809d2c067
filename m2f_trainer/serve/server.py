"""`m2f serve`: load a model, listen, and stop in order."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import replace

import uvicorn
from fastapi import FastAPI

from m2f_trainer.config.arguments import parse_pixel_range
from m2f_trainer.inference.predictor import Precision, Predictor
from m2f_trainer.serve.app import LOOPBACK, ServeOptions, create_app


def serve(
    model: str,
    host: str,
    port: int,
    options: ServeOptions,
    *,
    pixel_range: str | None = None,
    precision: Precision = "auto",
    ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; requests that have arrived are answered first.

    Args:
        model: a model folder or a Hub id.
        host: the address to listen on.
        port: 0 for any that is free.
        options: where `host` is not a loopback address, `hosts` becomes None: any host name leads to the server.
        pixel_range: the recipe field, by default the model's own.
        precision: as of `Predictor`.
        ready: called with the server's address as soon as clients can connect.

    Raises:
        OSError: the address can't be used.
        ModelFolderError: there is no such model.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))  # before the model is loaded, which takes time
        predictor = Predictor.from_pretrained(model, precision=precision)
        if (chosen := parse_pixel_range(pixel_range or "auto")) != "auto":
            predictor.pixel_range = chosen
        app = create_app(predictor, options if host in LOOPBACK else replace(options, hosts=None))
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again when it has stopped
            signal.signal(number, lambda *_: None)
        address = f"[{host}]" if ":" in host else host
        listening.listen(2048)  # connections wait until uvicorn accepts them
        ready(f"http://{address}:{listening.getsockname()[1]}/")
        uvicorn_server(app).run(sockets=[listening])


def uvicorn_server(app: FastAPI) -> uvicorn.Server:
    """An application ready to run."""
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning", server_header=False)
    return uvicorn.Server(config)
