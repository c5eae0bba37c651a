"""What tests need of the backend and `keras.ops` cannot say: compiled functions and gradients, on
TensorFlow and on JAX; and what both take of TensorFlow, where it is installed."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.datasets import load_digits

JAX = keras.backend.backend() == "jax"


def digits():
    """The 8x8 digits in the order and split of `tasks.datasets`, which needs TensorFlow: images and
    labels to train on, and to test on. `tests/tasks/test_datasets.py` holds them together."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # neighbours are by the same writer
    x, y = data.images.astype(np.uint8)[order][..., None], data.target[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def dataset(*arrays):
    """A `tf.data.Dataset` of batches of eight: both backends take it."""
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(8)


def served(folder, inputs):
    """What a model that was exported to a folder predicts, computed by TensorFlow."""
    model = pytest.importorskip("tensorflow").saved_model.load(str(folder))  # its functions do not keep it
    return model.serve(inputs)


if JAX:
    import jax

    TAPES = [(jax, "grad"), (jax, "value_and_grad"), (jax, "vjp")]  # all by which a gradient is taken

    def in_a_graph(function, jit):
        """The function in a graph, compiled or not; on JAX there is no other graph than a compiled
        one."""
        return jax.jit(function) if jit else function

    def of_any_batch(function, shapes, dtype, jit):
        """The same for arrays `[k, batch, *features]` of shapes `[k, *features]` and any batch."""
        return in_a_graph(function, jit)

    def slopes(function, points, cotangent=1.0):
        """Derivatives of the sum of cotangent times function, by each point."""
        return jax.grad(lambda points: ops.sum(ops.multiply(cotangent, function(*points))))(tuple(points))

else:
    import tensorflow as tf

    TAPES = [(tf, "GradientTape")]  # all by which a gradient is taken

    def in_a_graph(function, jit):
        """The function in a graph, compiled or not; on JAX there is no other graph than a compiled
        one."""
        return tf.function(function, jit_compile=jit, autograph=False)

    def of_any_batch(function, shapes, dtype, jit):
        """The same for arrays `[k, batch, *features]` of shapes `[k, *features]` and any batch."""
        specs = [tf.TensorSpec((shape[0], None, *shape[1:]), dtype) for shape in shapes]
        return tf.function(function, input_signature=specs, jit_compile=jit, autograph=False)

    def slopes(function, points, cotangent=1.0):
        """Derivatives of the sum of cotangent times function, by each point."""
        points = tuple(points)
        with tf.GradientTape() as tape:
            tape.watch(points)
            value = ops.sum(ops.multiply(cotangent, function(*points)))
        return tape.gradient(value, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def compiled(function):
    """The function under XLA."""
    return in_a_graph(function, True)
