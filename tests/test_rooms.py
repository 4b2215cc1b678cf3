"""The house rules a machine can see: who may import whom, and how long a file or function gets."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In this order: a file imports only from its own room and the ones before it.
ROOMS = (
    "pallas_kernels",
    "dsv3_jax.config",
    "dsv3_jax.parallel",
    "dsv3_jax.model",
    "dsv3_jax.data",
    "dsv3_jax.checkpoints",
    "dsv3_jax.training",
    "dsv3_jax.planning",
    "dsv3_jax.inference",
    "dsv3_jax.evaluation",
    "dsv3_jax.cli",
    "configs",
    "scripts",
)
# The training loop evaluates and samples as it goes.
MAY_LOOK_AHEAD = {
    "dsv3_jax/training/loop.py": {"dsv3_jax.inference", "dsv3_jax.evaluation"},
}
# The command line wraps whatever a script calls, so it must not know any of it.
ALLOWED_ROOMS = {"dsv3_jax.cli": {"dsv3_jax.config", "dsv3_jax.cli"}}

STANDARD_LIBRARY = sys.stdlib_module_names
KERNEL_PACKAGES = {"jax", "jaxlib", "numpy", "ml_dtypes", "pallas_kernels"}
REFERENCE_PACKAGES = {"torch", "transformers", "tensorflow", "clu", "safetensors"}
# These measure us beside the references, so they import them and hold both programs.
BENCHMARKS = "scripts/benchmark_"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 90
MAX_SCRIPT_LINES = 60

FOLDERS = ("dsv3_jax", "pallas_kernels", "configs", "scripts")


def library_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> tuple[str, ast.Module]:
    """(path from the repository's root, syntax tree)."""
    return path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def room_of(module: str) -> str | None:
    """The room that holds a dotted module name."""
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            # `from dsv3_jax import model` names a room in the alias.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def import_violations(name: str, tree: ast.Module) -> Iterator[str]:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
    here = room_of(module)
    allowed = ALLOWED_ROOMS.get(
        here or "", set(ROOMS[: ROOMS.index(here) + 1] if here else ROOMS)
    ) | MAY_LOOK_AHEAD.get(name, set())
    for line, imported in imports(tree, package):
        room, top = room_of(imported), imported.partition(".")[0]
        if room is not None and room not in allowed:
            yield f"{name}:{line} imports {imported}: {here} comes before {room}"
        if top in REFERENCE_PACKAGES and not name.startswith(BENCHMARKS):
            yield f"{name}:{line} imports {imported}: references belong in tests/"
        if here == "pallas_kernels" and top not in KERNEL_PACKAGES | STANDARD_LIBRARY:
            yield f"{name}:{line} imports {imported}: kernels know JAX and nothing else"
        if "shard_map" in imported and here not in ("dsv3_jax.parallel", "pallas_kernels"):
            yield f"{name}:{line} imports {imported}: only dsv3_jax/parallel places arrays"


def length_violations(name: str, tree: ast.Module, lines: int) -> Iterator[str]:
    limit = MAX_FILE_LINES
    if name.startswith("scripts/") and not name.startswith(BENCHMARKS):
        limit = MAX_SCRIPT_LINES
    if lines > limit:
        yield f"{name} has {lines} lines, more than {limit}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{name}:{node.lineno} {node.name} has {length} lines, more than "
                    f"{MAX_FUNCTION_LINES}"
                )


def report(violations: Iterator[str]) -> None:
    found = list(violations)
    assert not found, "\n" + "\n".join(found)


def test_files_import_only_from_rooms_before_them():
    report(line for path in library_files() for line in import_violations(*parse(path)))


def test_files_and_functions_are_short():
    report(
        line
        for path in library_files()
        for line in length_violations(*parse(path), len(path.read_text().splitlines()))
    )


def test_no_file_is_called_utils():
    report(
        f"{path.relative_to(ROOT)}: name it after what it does"
        for folder in (*FOLDERS, "tests")
        for path in (ROOT / folder).rglob("*")
        if path.stem in ("utils", "util", "helpers", "misc", "common")
    )


def test_every_library_file_is_in_a_room():
    report(
        f"{name} is in no room"
        for name, _ in map(parse, library_files())
        if name != "dsv3_jax/__init__.py"
        and room_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) is None
    )


def test_every_package_folder_has_an_init():
    report(
        f"{folder.relative_to(ROOT)} has no __init__.py, so it would not be installed"
        for top in ("dsv3_jax", "pallas_kernels")
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}
        if not (folder / "__init__.py").is_file()
    )


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("dsv3_jax/model/a.py", "from dsv3_jax.training import step", "before dsv3_jax.training"),
        ("dsv3_jax/model/a.py", "from ..training import step", "before dsv3_jax.training"),
        ("dsv3_jax/model/a.py", "from dsv3_jax import training", "before dsv3_jax.training"),
        ("dsv3_jax/model/a.py", "def f():\n    import dsv3_jax.data.x", "a.py:2 imports"),
        ("dsv3_jax/config/model.py", "import pallas_kernels", None),
        ("dsv3_jax/model/a.py", "from . import b", None),
        ("dsv3_jax/training/loop.py", "from dsv3_jax.inference import x", None),
        ("dsv3_jax/training/step.py", "from dsv3_jax.inference import x", "before"),
        ("dsv3_jax/cli.py", "from dsv3_jax.training import loop", "before"),
        ("pallas_kernels/a.py", "import flax.linen", "kernels know JAX"),
        ("pallas_kernels/a.py", "import functools, jax.numpy", None),
        ("dsv3_jax/model/a.py", "import torch", "references belong"),
        ("scripts/train.py", "import torch", "references belong"),
        ("scripts/benchmark_training.py", "import torch", None),
        ("dsv3_jax/model/a.py", "from jax import shard_map", "only dsv3_jax/parallel"),
        ("dsv3_jax/parallel/a.py", "from jax import shard_map", None),
    ],
)
def test_the_import_rule_sees(name, source, complaint):
    found = list(import_violations(name, ast.parse(source)))
    assert [complaint in line for line in found] == ([True] if complaint else [])


def test_the_length_rule_sees():
    tree = ast.parse("def f():\n" + "    x = 1\n" * 90)
    assert list(length_violations("dsv3_jax/a.py", tree, 91)) == [
        "dsv3_jax/a.py:1 f has 91 lines, more than 90"
    ]
    assert list(length_violations("dsv3_jax/a.py", ast.parse(""), 401))
    assert list(length_violations("scripts/a.py", ast.parse(""), 61))
    assert not list(length_violations("dsv3_jax/a.py", ast.parse(""), 400))
