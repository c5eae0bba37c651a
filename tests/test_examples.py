"""examples/: each has a flag for its first seed, uses it, and counts no seeds from 0. CI runs them."""

import ast
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
EXPERIMENTS = sorted(set((FOLDER / "paper").glob("*.py")) - {FOLDER / "paper" / "experiment.py"})


def flags_of(tree: ast.AST) -> dict[str, str]:
    """Variables of flags by the flags' names."""
    return {
        node.value.args[0].value: node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("flags.DEFINE_")
    }


def uses(tree: ast.AST, what: str) -> int:
    return sum(ast.unparse(node) == what for node in ast.walk(tree) if isinstance(node, ast.Attribute))


@pytest.mark.parametrize("path", [*EXAMPLES, FOLDER / "paper" / "experiment.py"], ids=lambda path: path.stem)
def test_the_first_seed_is_a_flag_that_is_used(path):
    tree = ast.parse(path.read_text())
    assert "seed" in flags_of(tree)
    assert uses(tree, f"{flags_of(tree)['seed']}.value") >= 1


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_takes_its_seed_from_the_setting(path):
    assert uses(ast.parse(path.read_text()), "setting.seed") >= 1


@pytest.mark.parametrize("path", [*EXAMPLES, *EXPERIMENTS], ids=lambda path: path.stem)
def test_no_seed_is_wired_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.For, ast.comprehension)) and "seed" in ast.unparse(node.target):
            assert not ast.unparse(node.iter).startswith("range("), ast.unparse(node.iter)
        if isinstance(node, ast.keyword) and node.arg == "seed":
            assert not isinstance(node.value, ast.Constant), ast.unparse(node)


def test_there_are_examples():
    assert len(EXAMPLES) >= 7
    assert len(EXPERIMENTS) >= 12
