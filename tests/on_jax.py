"""JAX in a process of its own."""

import os
import pathlib
import subprocess
import sys

import numpy as np


def table_of_jax(module, file):
    """The arrays that a module of tests writes to a file, by JAX in an interpreter in which
    importing TensorFlow fails."""
    hide = "import runpy, sys; sys.modules['tensorflow'] = None;"
    folder = str(pathlib.Path(module.__file__).parent)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"{hide} runpy.run_module({module.__name__!r}, run_name='__main__')", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)
