"""Every learner starts alike to the bit on TensorFlow and, in a process of its own, on JAX, and
takes the same steps."""

import os
import pathlib
import subprocess
import sys

import learner_table
import numpy as np
import pytest

from keras_blur.learners import BaselineLearner, Learner

pytest.importorskip("jax")


def of_jax(folder):
    """The table's numbers, of JAX in an interpreter in which importing TensorFlow fails."""
    program, file = pathlib.Path(learner_table.__file__), folder / "learners.npz"
    hide = "import runpy, sys; sys.modules['tensorflow'] = None;"
    paths = os.pathsep.join([str(program.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"{hide} runpy.run_module('learner_table', run_name='__main__')", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)


def test_starts_are_equal_and_steps_to_rounding(tmp_path):
    ours, theirs = learner_table.made(), of_jax(tmp_path)
    assert set(ours) == set(theirs)
    for name, wanted in ours.items():
        found = theirs[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        rounding = learner_table.ROUNDING if "/end/" in name else 0.0
        assert np.abs(found - wanted).max() <= rounding * np.abs(wanted).max(), name


def test_no_learner_is_missing():
    kinds, seen = [Learner], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        seen |= {kind} if kind.__module__.startswith("keras_blur.learners.") and not kind.__abstractmethods__ else set()
    assert BaselineLearner in seen
    assert {type(make()) for make in learner_table.LEARNERS.values()} == seen
