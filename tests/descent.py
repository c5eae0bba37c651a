"""The exactness check of every layer and graph: the backprop genome equals Keras's SGD.

A Keras model is converted, both take the same batches, and their weights are compared by name.
"""

import keras
import numpy as np
from on_backend import JAX

import keras_blur as kb

RATE = 2.0**-6  # exact in every type
# On JAX Keras's own mean, variance, tanh and attention compute in float32: see
# `keras_blur.backend`.
ROUNDING = 1e-5 if JAX else 0.0


def randomized(model, seed=0):
    """Randomises all weights of a model, including moving statistics, and returns it."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype.startswith("float"):
            value = 0.5 * rng.standard_normal(variable.shape)
            variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return model


def named(model):
    """The numbers of a model's weights, by path."""
    found = {
        variable.path.split("/", variable.path.startswith(model.name + "/"))[-1]: variable for variable in model.weights
    }
    assert len(found) == len(model.weights)
    return {name: np.array(variable) for name, variable in found.items() if "seed" not in name}


def assert_descends(twin, x, y, *, loss="mean_squared_error", steps=3, tolerance=1e-9, still=(), **options):
    """Asserts that steps of the backprop genome are those of SGD.

    Args:
        twin: a Keras model.
        x: inputs of a batch.
        y: labels of a batch.
        loss: the loss or losses.
        steps: number of steps, all on the same batch.
        tolerance: largest difference of a weight relative to the largest of its array.
        still: names of weights that have no gradient, such as a bias before a normalisation.
        **options: of `compile` and `train_on_batch`.

    Returns:
        The model that learned with the genome.
    """
    weight = options.pop("sample_weight", None)
    model = kb.convert(twin, kb.genomes.backprop(RATE))
    model.compile(loss=loss, jit_compile=JAX, run_eagerly=not JAX, **options)
    twin.compile(keras.optimizers.SGD(RATE), loss, jit_compile=JAX, run_eagerly=not JAX, **options)
    before = named(twin)
    for _ in range(steps):
        ours, theirs = (one.train_on_batch(x, y, sample_weight=weight) for one in (model, twin))
    np.testing.assert_allclose(np.ravel(ours)[0], np.ravel(theirs)[0], rtol=1e-5)
    assert_same(named(model.to_keras()), named(twin), tolerance)
    learned = {variable.path for variable in twin.trainable_variables}
    for name, value in named(twin).items():
        if any(path.endswith(name) for path in learned) and name not in still:
            assert np.abs(value - before[name]).max() > 1e-6, f"{name} did not move"
    return model


def assert_same(found, wanted, tolerance):
    """Asserts that two mappings of arrays are equal, relative to the largest number of each."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        gap = np.abs(found[name] - value).max() / np.abs(value).max()
        assert gap <= max(tolerance, ROUNDING), f"{name}: {gap:.3g}"
