"""`m2f serve`: a model as an HTTP server."""

import argparse
import os
import sys
from collections.abc import Sequence

from m2f_trainer.cli.console import add_limit_option, add_precision_option, add_range_option, positive_int, say
from m2f_trainer.cli.predict import threshold

SUMMARY = "a model as an HTTP server: images in, COCO results out"
DESCRIPTION = (
    "Answer images with COCO results, polygons or overlays over HTTP. Concurrent requests are predicted in batches. "
    "SIGTERM and Ctrl-C stop the server after it has answered what it has received. Needs pip install "
    "'m2f-trainer[serve]'."
)
EXAMPLES = (
    "m2f serve runs/first",
    "curl --data-binary @photo.jpg http://127.0.0.1:8000/instances",
    "curl --data-binary @photo.jpg 'http://127.0.0.1:8000/instances?format=overlay&threshold=0.5' -o out.jpg",
)


def port_number(text: str) -> int:
    """An argparse type: a port, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 65535, got {text!r}")
    return int(text)


def waiting_time(text: str) -> float:
    """An argparse type: up to a minute, in seconds. argparse reports the ValueError."""
    seconds = float(text)
    if not 0 <= seconds <= 60:
        raise argparse.ArgumentTypeError(f"expected 0 to 60 seconds, got {text!r}")
    return seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of a model")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: all, for a proxy that checks who asks [%(default)s]",
    )
    parser.add_argument("--port", type=port_number, default=8000, help="0: any that is free [%(default)s]")
    parser.add_argument(
        "--threshold",
        type=threshold,
        metavar="SCORE",
        default="auto",
        help="minimum score of an instance where a request gives none; auto: the best of each class on the validation "
        "images of the training, or 0.5 if the model has none [%(default)s]",
    )
    parser.add_argument(
        "--batch_size", type=positive_int, metavar="N", default=4, help="images per batch [%(default)s]"
    )
    parser.add_argument(
        "--max_wait",
        type=waiting_time,
        metavar="SECONDS",
        default=0.02,
        help="how long an image waits for others to fill a batch [%(default)s]",
    )
    parser.add_argument(
        "--max_open",
        type=positive_int,
        metavar="N",
        default=64,
        help="requests that wait or are answered at the same time; further ones get status 503 [%(default)s]",
    )
    parser.add_argument(
        "--max_bytes", type=positive_int, metavar="N", default=2**25, help="bytes of a request [%(default)s]"
    )
    parser.add_argument(
        "--label_studio_url",
        metavar="URL",
        help="Label Studio server whose images are read, with the access token in the environment variable "
        "LABEL_STUDIO_API_KEY [none: its tasks must contain their images]",
    )
    add_range_option(parser, "as in the model's training")
    add_limit_option(parser)
    add_precision_option(parser, "bf16 on GPUs that have it")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.errors import check_model_path, needs
    from m2f_trainer.masks.rle import allow_pixels

    needs("fastapi", "uvicorn", "python_multipart", "prometheus_client", extra="serve")
    check_model_path(arguments.model)
    allow_pixels(arguments.max_pixels)
    from m2f_trainer.serve.app import ServeOptions
    from m2f_trainer.serve.label_studio import ImageReader
    from m2f_trainer.serve.server import serve

    name = os.path.basename(os.path.normpath(arguments.model))  # noqa: PTH119 (no other part of a path is shown)

    def announce(address: str) -> None:
        say(f"{name} answers at {address} (Ctrl-C stops it)")
        sys.stdout.flush()  # it may be a file or a pipe

    options = ServeOptions(
        name=name,
        threshold=arguments.threshold,
        batch_size=arguments.batch_size,
        max_wait=arguments.max_wait,
        max_open=arguments.max_open,
        max_bytes=arguments.max_bytes,
        reader=ImageReader(arguments.label_studio_url, os.environ.get("LABEL_STUDIO_API_KEY"), arguments.max_bytes),
    )
    serve(
        arguments.model,
        arguments.host,
        arguments.port,
        options,
        pixel_range=arguments.pixel_range,
        precision=arguments.precision,
        ready=announce,
    )
    say("Stopped: all requests are answered.")
