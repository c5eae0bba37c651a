"""Shapes of arrays in type hints, checked where the functions of the core are called: by
jaxtyping's import hook, so in an interpreter of its own."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CALLS = [
    "wrong_shapes.py",
    *(f"test_twin.py::test_step_agrees[{name}]" for name in ("pair_normalized", "whitening_rows_orthogonal_3")),
    "test_connections.py::test_a_convolution_is_dense_on_patches[2-size0-strides0-valid-dilation0-shape0]",
    "test_connections.py::test_a_population_is_a_loop_over_members[dense-2]",
    "test_feedback.py::test_encode",
    "test_weightless.py::test_normalisation[batch]",
]


def test_arrays_have_the_shapes_of_the_hints():
    """Steps, populations, convolutions, whitening, feedback and normalisation; and calls with wrong
    shapes, each of which an error names."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "--jaxtyping-packages=keras_blur.core,beartype.beartype",
            *(str(HERE / call) for call in CALLS),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
