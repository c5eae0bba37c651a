"""Every estimator gives the same numbers on JAX as on TensorFlow."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from estimates import measured

pytest.importorskip("jax")

PROGRAM = pathlib.Path(__file__).parent / "estimates.py"


def run_on_jax(path, bits):
    """Runs the program in a process of its own, with JAX's 64 bits or without."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1" if bits == 64 else "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_estimates_of_jax_are_those_of_tensorflow(tmp_path):
    run_on_jax(tmp_path / "jax.npz", 64)
    ours = measured()
    with np.load(tmp_path / "jax.npz") as theirs:
        assert set(theirs) == set(ours)
        for name, value in ours.items():
            if name.startswith("noise"):
                np.testing.assert_array_equal(theirs[name], value, err_msg=name)
            else:
                atol = 1e-8 * np.abs(value).max()
                np.testing.assert_allclose(theirs[name], value, rtol=0, atol=atol, err_msg=name)
    for name in ours:
        if name.startswith("unroll"):  # recomputation changes nothing
            again = ours[name.replace("unroll", "recomputed")]
            np.testing.assert_allclose(again, ours[name], rtol=1e-9, atol=1e-12 * np.abs(again).max())


@pytest.mark.slow
def test_cma_es_has_float32_where_jax_has_no_64_bits(tmp_path):
    run_on_jax(tmp_path, 32)
