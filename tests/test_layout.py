"""The structure of the package: imports have one direction, and the map in CONTRIBUTING.md matches the files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m2f_trainer"
FILES = sorted(PACKAGE.rglob("*.py"))
MAP = ROOT / "CONTRIBUTING.md"

ROOMS = [
    "errors",
    "version",
    "model",
    "distributed",
    "run_folder",
    "config",
    "masks",
    "viz",
    "data",
    "doctor",
    "inference",
    "evaluation",
    "export",
    "serve",
    "hub",
    "training",
    "cli",
    "__main__",
]
"""A room imports from itself and the rooms before it. model/ travels to the Hub alone and imports from no other."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """Rooms of our package that a file imports, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            names = []
        yield from (name.split(".")[1] for name in names if name.startswith("m2f_trainer."))


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_imports_only_from_its_own_room_and_earlier_ones(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the public names, imported on first use
    own = room(path)
    allowed = {own} if own == "model" else {*ROOMS[: ROOMS.index(own)], own}
    assert set(imported_rooms(ast.parse(path.read_text(encoding="utf-8")))) <= allowed


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body


@pytest.mark.parametrize("path", [path for path in FILES if not path.stem.startswith("__")], ids=name)
def test_a_module_has_a_test_file_of_its_name(path: Path) -> None:
    below = path.relative_to(PACKAGE)
    assert (ROOT / "tests" / below.parent / f"test_{below.name}").is_file()


def test_every_test_folder_mirrors_a_room() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "_."}
    assert folders <= {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"faults", "security", "benchmarks"}


def mapped_files() -> set[Path]:
    """The paths in the tree of CONTRIBUTING.md, which starts with a line `m2f_trainer/`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", MAP.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if re.search(r"^m2f_trainer/", block, flags=re.MULTILINE)), "")
    paths, folders = set(), []
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        entry = line.split()[0]
        paths.add(Path(*(folder for _, folder in folders), entry))
        if entry.endswith("/"):
            folders.append((indent, entry))
    return paths


def test_the_map_in_contributing_is_what_is_on_disk() -> None:
    listed = mapped_files()
    modules = {path.relative_to(ROOT) for path in FILES if path.name not in ("__init__.py", "__main__.py")}
    assert {path for path in listed if path.suffix == ".py"} == modules
    assert all((ROOT / path).exists() for path in listed)


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert re.search(rf"<!-- command: {command} -->\n+```bash\n.+?\n```", text, flags=re.DOTALL), command
