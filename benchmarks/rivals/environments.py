"""An environment of its own for each list of packages."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = 8e9
"""Bytes that PyTorch's CUDA build and its companions take at most."""
VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def prepare(packages: Sequence[str], folder: Path) -> Path:
    """The Python of an environment with these packages, made where it isn't there yet; without packages, this one.

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
            f"{folder}: an environment takes up to {NEEDED / 1e9:.0f} GB, and {free / 1e9:.1f} GB are free."
        )
    print(f"making {folder}: {' '.join(packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
    finished.write_text(json.dumps(list(packages)) + "\n", encoding="utf-8")
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the packages in an environment; for ours, the commit too."""
    names = [package.split("==")[0] for package in packages] or ["torch", "transformers", "m2f-trainer"]
    told = subprocess.run([str(python), "-c", VERSIONS, *names], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(told.stdout)
    if not packages:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        told = subprocess.run(git, check=False, capture_output=True, text=True)
        found["commit"] = told.stdout.strip() or "not in git"
    return found
