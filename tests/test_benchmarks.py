"""Benchmarks: ratios of each version in their order (over_versions.py), operations of a program
(measure.py)."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "over_versions.py"


def document(version, network, **ratios):
    rows = [{"name": name, "ratio": value, "memory_ratio": 2.0 * value} for name, value in ratios.items()]
    return {"version": version, "network": network, "backend": "jax", "rows": [{"name": "keras SGD"}, *rows]}


def test_versions_are_in_the_order_of_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import over_versions

    given = [document(version, "mlp", genome=size) for version, size in (("0.10.0", 3.0), ("0.10.0rc1", 2.0))]
    given.append(document("0.9.1", "mlp", genome=1.5, other=1.0))
    found = over_versions.by_panel([*given, document("0.9.1", "lenet", genome=2.0)])
    assert list(found) == ["mlp, jax", "lenet, jax"]
    assert list(found["mlp, jax"]["genome"]) == ["0.9.1", "0.10.0rc1", "0.10.0"]
    assert found["mlp, jax"]["genome"]["0.10.0"] == {"ratio": 3.0, "memory_ratio": 6.0}
    assert list(found["mlp, jax"]["other"]) == ["0.9.1"]


def test_the_picture_is_drawn(tmp_path):
    for version in ("0.1.0", "0.2.0"):
        (tmp_path / f"{version}.json").write_text(json.dumps(document(version, "mlp", genome=1.5)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, sorted(tmp_path.glob("*.json"))), f"--plot={tmp_path / 'drawn.png'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn.png").stat().st_size > 5000


def test_operations_of_a_program_are_those_of_its_products():
    import jax
    import measure

    def program(x, kernel, images):
        rounds, _ = jax.lax.scan(lambda carry, _: (jax.numpy.tanh(carry @ kernel), None), x, length=3)
        features = jax.lax.conv(images, jax.numpy.ones((7, 3, 5, 5)), (1, 1), "VALID")
        half = jax.numpy.linalg.cholesky(kernel)
        return rounds, features, jax.lax.linalg.triangular_solve(half, kernel)

    arrays = (jax.numpy.ones(shape) for shape in ((4, 6), (6, 6), (2, 3, 8, 8)))
    products = 3 * 2 * (4 * 6 * 6) + 2 * (2 * 7 * 4 * 4) * (3 * 5 * 5) + 6**3 // 3 + 6**3
    assert measure.operations(jax.make_jaxpr(program)(*arrays)) == products


def test_loops_of_unknown_length_are_refused():
    import jax
    import measure

    def program(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="known number of rounds"):
        measure.operations(jax.make_jaxpr(program)(jax.numpy.ones((2, 2))))
