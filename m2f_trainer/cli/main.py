"""The `m2f` command: parses the command line, runs one command, and turns errors into messages and exit statuses.

Each command is a module with SUMMARY, DESCRIPTION, EXAMPLES, `add_options` and `run`. These modules import everything
heavy inside `run`, so that help takes no time.
"""

import argparse
import io
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from m2f_trainer.cli import check, convert, demo, env, evaluate, export, predict, push, report, serve, train
from m2f_trainer.cli.console import say
from m2f_trainer.config.cores import scheduled_cores, usable_cores
from m2f_trainer.errors import M2FError, RunStopped, escape_controls
from m2f_trainer.version import __version__

GROUPS: dict[str, tuple[ModuleType, ...]] = {
    "start": (demo, check, env),
    "train": (train, evaluate, report),
    "use": (predict, serve, export, push, convert),
}
COMMANDS = {module.__name__.rpartition(".")[2]: module for modules in GROUPS.values() for module in modules}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: success. 1: an error whose message says what to do. 2: wrong usage. 75: a signal stopped a training that can be
    resumed, so that a scheduler can queue it again. 130: Ctrl-C outside training. 141: the reader of the output, such
    as `| head`, has closed it.
    """
    parser = build_parser()
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.command != "train":
        parser.error(f"{arguments.command} takes no {options[0]}; see m2f {arguments.command} --help")
    disable_progress_bars_without_terminal()
    limit_threads()
    warnings.filterwarnings("ignore", message=r"Image size .* exceeds limit")  # Pillow's; our own message follows
    escape_unprintable_output()
    escape_logged_controls()
    try:
        status: int | None = COMMANDS[arguments.command].run(arguments, options)
        sys.stdout.flush()
        leave_process_group()
    except RunStopped as stop:
        say(f"m2f {arguments.command}: {stop}", stream="error")
        leave_process_group()
        return stop.status
    except KeyboardInterrupt:
        say("Interrupted.", stream="error")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        return 141
    except Exception as error:
        if not is_for_the_user(error):
            raise
        say(f"m2f {arguments.command}: {error}", stream="error")
        return error.status if isinstance(error, M2FError) else 1
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The options of `train` are recipe fields, which `config.recipe` parses."""
    overview = ["Fine-tune Mask2Former on DINOv3, DINOv2 and other backbones for instance segmentation."]
    for title, modules in GROUPS.items():
        overview += ["", title, *(f"  {module.__name__.rpartition('.')[2]:<10} {module.SUMMARY}" for module in modules)]
    parser = argparse.ArgumentParser(
        "m2f",
        description="\n".join(overview),
        epilog=f"m2f COMMAND --help shows the options of a command. A first run: {demo.EXAMPLES[0]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"m2f_trainer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help="one of the above")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            description=textwrap.fill(module.DESCRIPTION, 79),
            epilog="\n".join(["examples:", *(f"  {example}" for example in module.EXAMPLES)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=name != "train",
        )
        module.add_options(command)
    return parser


def disable_progress_bars_without_terminal() -> None:
    """If stderr is not a terminal, disable the progress bars of datasets and huggingface_hub before their import."""
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


def limit_threads(system: Path = Path("/")) -> None:
    """Let libraries start as many threads as a CPU quota grants: they see the cores only, and more threads wait for
    each other. OMP_NUM_THREADS stays as it is where it is set. `system` is the root of the file system.
    """
    cores = usable_cores(system)
    if cores < scheduled_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def escape_unprintable_output() -> None:
    """Escape characters that the encoding of stdout lacks (on Windows, most) instead of raising UnicodeEncodeError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class EscapedControls(logging.Formatter):
    """Formats a log record with control characters escaped, since names of files and classes are not trusted."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line of a record, without its traceback."""
        return escape_controls(super().formatMessage(record), kept="\n\t")


def escape_logged_controls() -> None:
    """Escape control characters in log messages that no handler of a caller prints."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapedControls())


def leave_process_group() -> None:
    """Leave the process group, if there is one. Not after an error: the other ranks may be stuck in a collective."""
    distributed = sys.modules.get("m2f_trainer.distributed")
    if distributed is not None:
        distributed.leave()


def is_for_the_user(error: Exception) -> bool:
    """Whether the message alone is useful: our errors, and those of the system with an errno, such as a full disk."""
    backbones = sys.modules.get("m2f_trainer.model.backbones")  # model/ raises an error type of its own
    from_system = isinstance(error, OSError) and error.errno is not None
    return (
        isinstance(error, M2FError)
        or from_system
        or (backbones is not None and isinstance(error, backbones.ModelError))
    )
