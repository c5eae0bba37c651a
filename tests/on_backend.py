"""What tests need of the backend and `keras.ops` cannot say: compiled functions and gradients, on
TensorFlow and on JAX."""

import keras
from keras import ops

JAX = keras.backend.backend() == "jax"

if JAX:
    import jax

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
