"""What the commands share: messages, next steps, and an argument type."""

import argparse
import os
import sys


def say(text: str, stream: str = "output") -> None:
    """Print on the main process; an error is printed on every process, with the rank."""
    rank = os.environ.get("RANK", "0")
    if stream == "error":
        print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr)
    elif rank == "0":
        print(text)


def suggest(*commands: str) -> None:
    """Print the commands to run next."""
    say("\n".join(["", "Next:", *(f"  {command}" for command in commands)]))


def natural_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
