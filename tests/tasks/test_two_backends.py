"""Every task distribution draws the same episodes on TensorFlow and, in a process of its own, on
JAX."""

import numpy as np
import pytest
import task_table
from on_jax import table_of_jax

from keras_blur.tasks.base import Tasks

pytest.importorskip("jax")


@pytest.mark.slow
def test_episodes_are_equal_on_both_backends(tmp_path):
    ours, theirs = task_table.drawn(), table_of_jax(task_table, tmp_path / "episodes.npz")
    assert set(ours) == set(theirs)
    for name, wanted in ours.items():
        found = theirs[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        distribution, part = name.split("/")
        labels = part.endswith("y") and set(np.unique(wanted)) <= {-1.0, 0.0, 1.0}
        rounding = 0.0 if labels or distribution not in task_table.ROUNDED else task_table.TOLERANCE
        assert np.abs(found - wanted).max() <= rounding * np.abs(wanted).max(), name


def test_no_distribution_is_missing():
    kinds, seen = [Tasks], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        seen |= {kind} if kind.__module__.startswith("keras_blur.") else set()
    made = {type(make()) for make in {**task_table.EXACT, **task_table.ROUNDED}.values()}
    assert made == seen - {Tasks}
