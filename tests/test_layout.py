"""The house: imports point one way, functions stay short, and the README's map is the disk."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "m2f_trainer"
FILES = sorted(PACKAGE.rglob("*.py"))
README = ROOT / "README.md"

ORDER = [
    "errors",
    "auto_classes",
    "typed_json",
    "charts",
    "markup",
    "model",
    "rendezvous",
    "arguments",
    "train_arguments",
    "recipe",
    "field_help",
    "data",
    "evaluation",
    "inference",
    "sharing",
    "training",
    "cli_options",
    "cli",
    "__main__",
]
"""Who may import whom: a room imports from itself and from those before it. model/ travels alone, so it comes early."""


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


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is Triton's, which takes nothing but pointers and numbers, one by one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def required(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many arguments a caller must give."""
    named = [*function.args.posonlyargs, *function.args.args]
    positional = len([one for one in named if one.arg not in ("self", "cls")]) - len(function.args.defaults)
    return positional + sum(default is None for default in function.args.kw_defaults)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_imports_only_from_its_own_room_and_earlier_ones(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the public names, loaded on first use
    own = room(path)
    allowed = {own} if own == "model" else {*ORDER[: ORDER.index(own)], own}
    assert set(imported_rooms(ast.parse(path.read_text(encoding="utf-8")))) <= allowed


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_has_short_functions_of_few_parameters_and_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    long = [f"{one.name}: {lines(one)} lines" for one in functions(tree) if lines(one) > 60]
    assert not long
    assert not [one.name for one in functions(tree) if required(one) > 7 and not is_kernel(one)]
    assert ast.get_docstring(tree) or not tree.body


def test_functions_are_short_on_the_whole() -> None:
    sizes = sorted(lines(one) for path in FILES for one in functions(ast.parse(path.read_text(encoding="utf-8"))))
    assert statistics.median(sizes) <= 12
    assert sizes[int(len(sizes) * 0.9)] <= 40


def test_every_test_folder_mirrors_a_room() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "_."}
    assert folders <= {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"faults"}


def readme_map() -> list[tuple[Path, str]]:
    """(path, role) of each entry, one or two a line, in the README's tree, which starts with a line `m2f_trainer/`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if re.search(r"^m2f_trainer/", block, flags=re.MULTILINE)), "")
    entries, folders = [], []
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        for entry, _, role in (part.partition(" ") for part in re.split(r" {2,}(?=\S+\.py )", line.strip())):
            entries.append((Path(*(folder for _, folder in folders), entry), role.strip()))
            if entry.endswith("/"):
                folders.append((indent, entry))
    return entries


@pytest.mark.skipif(not README.is_file(), reason="no README.md yet")
def test_the_map_in_the_readme_is_what_is_on_disk() -> None:
    listed = {path for path, _ in readme_map()}
    modules = {path.relative_to(ROOT) for path in FILES if path.name not in ("__init__.py", "__main__.py")}
    assert {path for path in listed if path.suffix == ".py" and path.name[:2] != "__"} == modules
    assert all((ROOT / path).exists() for path in listed)


@pytest.mark.skipif(not README.is_file(), reason="no README.md yet")
def test_the_map_says_what_a_file_is_in_at_most_seven_words() -> None:
    wordy = [f"{path}: {role}" for path, role in readme_map() if len(role.split()) > 7]
    assert not wordy


@pytest.mark.skipif(not README.is_file(), reason="no README.md yet")
def test_the_readme_has_at_most_200_lines_and_its_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for command in ("demo", "test"):
        assert re.search(rf"<!-- command: {command} -->\n+```bash\n.+?\n```", text, flags=re.DOTALL), command
