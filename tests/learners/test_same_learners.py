"""Every learner starts alike to the bit on TensorFlow and, in a process of its own, on JAX, and
takes the same steps."""

import learner_table
import numpy as np
import pytest
from on_jax import table_of_jax

from keras_blur.learners import BaselineLearner, Learner

pytest.importorskip("jax")


@pytest.mark.slow
def test_starts_are_equal_and_steps_to_rounding(tmp_path):
    ours, theirs = learner_table.made(), table_of_jax(learner_table, tmp_path / "learners.npz")
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
