"""Imports between the rooms of the package go one way; see CONTRIBUTING.md."""

import ast
import pathlib

import pytest

import keras_blur

ROOT = pathlib.Path(keras_blur.__file__).parent

# Checks of plain arguments and files that are written whole: every room may import them, and they
# import none.
SHARED = {"arguments", "files"}
# Each room, and the rooms it may import from.
# fmt: off
BELOW = {
    "_version": set(),
    "compiling": set(),
    "backend": set(),
    "distribution": {"backend"},
    "core": {"backend", "_version"},
    "genomes": {"core"},
    "layers": {"backend", "core"},
    "checks": {"backend", "core"},
    "models": {"backend", "layers", "core", "checks"},
    "conformance": {"core"},
    "tasks": {"backend", "core", "checks"},
    "learners": {"backend", "core", "genomes", "layers", "models", "distribution", "checks"},
    "training": {"backend", "tasks", "checks", "distribution"},
    "meta": {"backend", "training", "learners", "tasks", "core", "checks", "compiling", "distribution"},
    "bilevel": {"backend", "training", "learners", "layers", "tasks", "core", "checks", "distribution"},
    "report": {"backend", "training", "learners", "meta", "models", "layers", "core", "tasks", "compiling", "checks"},
}
TOP = {"__init__", "__main__", "cli"}  # may import all


def rooms_imported(tree: ast.AST) -> set[str]:
    """Names of the rooms that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keras_blur":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("keras_blur.")}
    return found


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


MODULES = sorted(path for path in ROOT.rglob("*.py") if room_of(path) not in TOP | SHARED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_what_is_below(path):
    room = room_of(path)
    assert room in BELOW, f"{room} has no place in the map"
    imported = rooms_imported(ast.parse(path.read_text())) - {room} - SHARED
    assert imported <= BELOW[room], f"{path.name} reaches up to {sorted(imported - BELOW[room])}"


def test_the_check_sees_a_wrong_import():
    tree = ast.parse("from keras_blur import models\nimport keras_blur.cli.fit\nfrom keras_blur.core.network import step")
    assert rooms_imported(tree) == {"models", "cli", "core"}


def test_the_map_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(BELOW):
        free = {room for room, below in BELOW.items() if room not in done and below <= done}
        assert free, f"cycle among {sorted(set(BELOW) - done)}"
        done |= free


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_file_names_tf_distribute(path):
    uses = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "distribute" and isinstance(node.value, ast.Name)
    ]
    assert bool(uses) == (path == ROOT / "backend" / "with_tensorflow" / "devices.py")
