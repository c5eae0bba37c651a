"""examples/: seeds are flags, arms see the same batches, references are strong. CI runs the examples."""

import ast
import pathlib

import numpy as np
import pytest
import tensorflow as tf

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


def functions_of(name: str, *wanted: str) -> list:
    """Functions of an example, without its flags, which two examples cannot both define in one process."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space: dict = {"np": np, "tf": tf}
    exec(compile(tree, name, "exec"), space)
    return [space[one] for one in wanted]


def test_arms_of_noisy_labels_share_the_order_of_batches():
    (batches,) = functions_of("noisy_labels", "batches")
    x, y = np.arange(10, dtype="float32")[:, None], np.arange(10)
    whole = [(a.numpy()[:, 0].tolist(), b.numpy().tolist()) for a, b in batches(x, y, 3, range(4), 5)]
    later = [(a.numpy()[:, 0].tolist(), b.numpy().tolist()) for a, b in batches(x, y, 3, range(2, 4), 5)]
    assert len(whole) == 4 * 3
    assert later == whole[6:]
    assert all(a == b for a, b in whole)
    for epoch in range(4):
        assert len({one for a, _ in whole[3 * epoch : 3 * epoch + 3] for one in a}) == 9
    assert whole[:3] != whole[3:6]


def test_hopfield_goes_on_from_where_one_step_leads():
    hopfield, nearest = functions_of("remember", "hopfield", "nearest")
    rng = np.random.default_rng(0)
    patterns = rng.choice([-1.0, 1.0], (400, 4, 16))
    shown = np.argsort(rng.random((400, 4, 16)), axis=-1) < 8
    shown = shown.astype(float)
    cue = patterns * shown

    def accuracy(found):
        return np.mean((found == patterns)[shown == 0])

    once, often = (hopfield(patterns, cue, shown, most) for most in (1, 20))
    assert np.array_equal(often * shown, cue)  # the cue is held
    assert set(np.unique(often)) == {-1.0, 1.0}
    assert 0.93 < accuracy(once) < accuracy(often) < accuracy(nearest(patterns, cue, shown))
    assert accuracy(nearest(patterns, cue, shown)) > 0.99
