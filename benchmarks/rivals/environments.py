"""Virtual environments of the rivals."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = 8e9
"""Bytes: the most that an environment with PyTorch's CUDA build takes."""
VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def prepare(packages: Sequence[str], folder: Path) -> Path:
    """The Python of an environment with these packages, which is created if absent. Without packages: this Python.

    Raises:
        SystemExit: too little disk
        subprocess.CalledProcessError: pip failed
    """
    if not packages:
        return Path(sys.executable)
    python, finished = folder / "bin" / "python", folder / "packages.json"
    if finished.exists() and json.loads(finished.read_text(encoding="utf-8")) == list(packages):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED:
        raise SystemExit(
            f"{folder}: an environment takes up to {NEEDED / 1e9:.0f} GB, but only {free / 1e9:.1f} GB are free. "
            "Free some space, or choose another disk with --environments."
        )
    print(f"creating {folder}: {' '.join(packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
    finished.write_text(json.dumps(list(packages)) + "\n", encoding="utf-8")
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of an environment's packages; for our own environment also the commit."""
    names = [package.split("==")[0] for package in packages] or ["torch", "transformers", "m2f-trainer"]
    listed = subprocess.run([str(python), "-c", VERSIONS, *names], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(listed.stdout)
    if not packages:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, check=False, capture_output=True, text=True)
        found["commit"] = commit.stdout.strip() or "not in git"
    return found
