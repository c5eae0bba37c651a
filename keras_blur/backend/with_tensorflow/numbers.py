"""Products, systems of equations and random integers on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import ops

from keras_blur.backend.with_tensorflow.derivatives import stored
from keras_blur.backend.with_tensorflow.devices import on_platform
from keras_blur.backend.with_tensorflow.programs import by_xla

Array = Any

_LEAF = 16  # rows that XLA may factorise column by column


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices in the precision of their type, as far as TensorFlow's own setting
    allows (`tf.config.experimental.enable_tensor_float_32_execution`)."""
    return tf.matmul(a, b)


def mixed(states: Array, transform: Array) -> Array:
    """The states `[..., s, batch, units]` mixed by a transform `[..., source, target]`, as a matrix
    product."""
    *lead, rows, units = ops.shape(states)
    product = ops.matmul(ops.swapaxes(transform, -1, -2), ops.reshape(states, (*lead, rows * units)))
    return ops.reshape(product, (*ops.shape(product)[:-1], rows, units))


def tanh(x: Array) -> Array:
    """The hyperbolic tangent in the type of x; that of `keras.ops` rounds float64 to float32 on
    JAX."""
    return tf.math.tanh(x)


def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """The mean in the type of x; that of `keras.ops` rounds float64 to float32 on JAX."""
    return ops.mean(x, axis=axis, keepdims=keepdims)


def solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices; NaN for others, which do not
    affect the matrices beside them.

    XLA factorises column by column, which is slow on a CPU. There, its programs do so for small
    blocks only; the rest is matrix products.

    Args:
        matrix: `[..., n, n]`.
        right: `[..., n, m]`, with leading axes that broadcast.
    """
    if not by_xla() or not (matrix.shape.is_fully_defined() and right.shape.is_fully_defined()):
        return _solve_whole(matrix, right)
    return on_platform((matrix, right), cpu=lambda pair: _solve_by_xla(*pair), other=lambda pair: _solve_whole(*pair))


def _solve_whole(matrix: Array, right: Array) -> Array:
    return tf.linalg.cholesky_solve(tf.linalg.cholesky(matrix), right)


def _solve_by_xla(matrix: Array, right: Array) -> Array:
    lead = tf.broadcast_static_shape(matrix.shape[:-2], right.shape[:-2])
    return _solve_in_blocks(*(tf.broadcast_to(one, lead + one.shape[-2:]) for one in (matrix, right)))


@tf.custom_gradient
def _solve_in_blocks(matrix: Array, right: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    inverse = stored(_inverse_factor, matrix)

    def solve(right: Array) -> Array:
        return tf.matmul(inverse, tf.matmul(inverse, right), transpose_a=True)

    solution = solve(right)

    def gradients(gradient: Array) -> tuple[Array, Array]:
        of_right = solve(gradient)
        return -tf.matmul(of_right, solution, transpose_b=True), of_right

    return solution, gradients


def _inverse_factor(matrix: Array) -> Array:
    """The inverse of Cholesky's factor, of matrices of any size."""
    size = matrix.shape[-1]
    if size <= _LEAF:
        return tf.linalg.triangular_solve(
            tf.linalg.cholesky(matrix), tf.eye(size, batch_shape=tf.shape(matrix)[:-2], dtype=matrix.dtype)
        )
    half = size // 2
    first = _inverse_factor(matrix[..., :half, :half])
    below = tf.matmul(matrix[..., half:, :half], first, transpose_b=True)
    second = _inverse_factor(matrix[..., half:, half:] - tf.matmul(below, below, transpose_b=True))
    upper = tf.concat([first, tf.zeros_like(matrix[..., :half, half:])], -1)
    return tf.concat([upper, tf.concat([-tf.matmul(second, tf.matmul(below, first)), second], -1)], -2)


_KEY = 0x02461E293EC8F720  # with which TensorFlow mixes a seed into Philox's key and counter


_BLOCK = 4  # integers that Philox makes of one value of its counter


def bits(seed: Array, shape: tuple[Any, ...], dtype: str = "uint32") -> Array:
    """Uniform 32-bit integers of the Philox generator.

    Args:
        seed: two integers.
        shape: shape of the array.
        dtype: `"uint32"`, or `"int32"` for the same bits.
    """
    key, high = _mixed(seed)
    return _philox(shape, key, tf.concat([tf.constant([0], tf.uint64), high], 0), dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Rows `[rows, size]` of `bits(seed, [n, size])`.

    Args:
        seed: two integers.
        rows: indices `[rows]`.
        size: size of a row.
    """
    key, high = _mixed(seed)

    def row(number: Array) -> Array:
        begin = tf.cast(number, tf.int64) * size
        drawn = _philox((size + _BLOCK,), key, tf.concat([tf.cast(begin // _BLOCK, tf.uint64)[None], high], 0), "uint32")
        return tf.slice(drawn, [begin % _BLOCK], [size])

    return tf.map_fn(row, tf.convert_to_tensor(rows), fn_output_signature=tf.TensorSpec((size,), tf.uint32))


def _philox(shape: tuple[Any, ...], key: Array, counter: Array, dtype: str) -> Array:
    """Integers of Philox, TensorFlow's algorithm 1: identical under TensorFlow's kernels, XLA and
    the TPU lowering, unlike its floating-point draws."""
    shape = tf.convert_to_tensor(shape, tf.int32)
    return tf.raw_ops.StatelessRandomUniformFullIntV2(shape=shape, key=key, counter=counter, dtype=tf.as_dtype(dtype), alg=1)


def _mixed(seed: Array) -> tuple[Array, Array]:
    """Philox's key `[1]` and the high half of its counter `[1]`, as in TensorFlow's own draws but
    in fewer operations."""
    mixed = _philox((_BLOCK,), tf.constant([_KEY], tf.uint64), tf.cast(seed, tf.uint64), "uint32")
    low, high = tf.unstack(tf.reshape(tf.cast(mixed, tf.uint64), (2, 2)), axis=1)
    return tf.split(tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, tf.constant(32, tf.uint64))), 2)


def upper_product(a: Array, b: int) -> Array:
    """The upper 32 of the 64 bits of products.

    Args:
        a: uint32 numbers.
        b: a number from 0 to `2**32 - 1`.
    """
    wide = tf.cast(a, tf.uint64) * tf.constant(b, tf.uint64)
    return tf.cast(tf.bitwise.right_shift(wide, tf.constant(32, tf.uint64)), tf.uint32)
