"""Episodes of random numbers, and a check of outer gradients against difference quotients."""

import numpy as np
import pytest
from keras import ops

from keras_blur import backend
from keras_blur.meta.estimator import start


def draw_episodes(tasks, steps, batch, query, features, classes, dtype="float64"):
    """Episodes of random inputs and classes, labels of +1 and -1."""
    rng = np.random.default_rng(0)

    def labels(*shape):
        return 2 * np.eye(classes)[rng.integers(0, classes, shape)] - 1

    made = {
        "x": rng.standard_normal((tasks, steps, batch, features)), "y": labels(tasks, steps, batch),
        "query_x": rng.standard_normal((tasks, query, features)), "query_y": labels(tasks, query),
    }  # fmt: skip
    return {name: ops.convert_to_tensor(value, dtype) for name, value in made.items()}


def assert_difference_quotient(estimator, learner, outer, data, seed, gradients):
    """Asserts that gradients of the mean over tasks, summed over members, agree with a difference
    quotient of the objective along a direction."""
    rng = np.random.default_rng(2)
    direction = {name: rng.standard_normal(value.shape) for name, value in outer.items()}

    def loss(width):
        moved = {name: value + width * direction[name] for name, value in outer.items()}
        losses = estimator.objective(learner, moved, data, start(learner, moved, data, seed))[0]
        return float(ops.sum(backend.mean(losses, axis=1)))

    quotient = (loss(1e-6) - loss(-1e-6)) / 2e-6
    slope = sum(float(np.sum(np.asarray(gradients[name]) * direction[name])) for name in outer)
    assert slope == pytest.approx(quotient, rel=2e-6, abs=1e-8)
    assert abs(quotient) > 1e-3
