"""Random numbers that depend only on a seed.

The numbers do not depend on the device, the compiler, the number of replicas or earlier draws.
TensorFlow only draws the integers of the Philox generator. These are identical under TensorFlow's
kernels, XLA and the TPU lowering, unlike its floating-point draws. Floats are built here from the
upper bits of the integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

Array = Any


def seed_of(number: int | Array) -> Array:
    """Makes a seed, a pair of integers, from a 32-bit integer."""
    if isinstance(number, int) and not -(2**31) <= number < 2**31:
        raise ValueError(f"A seed must fit in 32 bits, from -2**31 to 2**31 - 1. Received: {number}")
    return tf.stack([tf.zeros((), tf.int32), tf.cast(number, tf.int32)])


def fold_in(seed: Array, *numbers: int | Array) -> Array:
    """Derives a seed from a seed and numbers such as a step, a member or a purpose."""
    for number in numbers:
        seed = tf.stack([_drawn(seed, (), tf.int32), tf.cast(number, tf.int32)])
    return seed


def bits(seed: Array, shape: tuple[int, ...]) -> Array:
    """Uniform 32-bit integers."""
    return _drawn(seed, shape, tf.uint32)


_KEY = 0x02461E293EC8F720  # with which TensorFlow mixes a seed into Philox's key and counter
_BLOCK = 4  # integers that Philox makes of one value of its counter


def _philox(shape: tuple[int, ...], key: Array, counter: Array, dtype: tf.DType) -> Array:
    """Integers of Philox, TensorFlow's algorithm 1."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(shape=shape, key=key, counter=counter, dtype=dtype, alg=1)


def _mixed(seed: Array) -> tuple[Array, Array]:
    """Philox's key `[1]` and the high half of its counter `[1]`, as in TensorFlow's own draws but
    in fewer operations."""
    mixed = _philox((_BLOCK,), tf.constant([_KEY], tf.uint64), tf.cast(seed, tf.uint64), tf.uint32)
    low, high = tf.unstack(tf.reshape(tf.cast(mixed, tf.uint64), (2, 2)), axis=1)
    return tf.split(tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, tf.constant(32, tf.uint64))), 2)


def _drawn(seed: Array, shape: tuple[int, ...], dtype: tf.DType) -> Array:
    key, high = _mixed(seed)
    return _philox(shape, key, tf.concat([tf.constant([0], tf.uint64), high], 0), dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Draws selected rows of `bits(seed, [n, size])` without the others: `[rows, size]`.

    Philox computes each block of integers from the block's index alone, so a row can start
    anywhere.

    Example:

    >>> seed = seed_of(0)
    >>> bool(tf.reduce_all(bits_of_rows(seed, [2, 5], 3) == tf.gather(bits(seed, (6, 3)), [2, 5])))
    True
    """

    key, high = _mixed(seed)

    def row(number: Array) -> Array:
        begin = tf.cast(number, tf.int64) * size
        drawn = _philox((size + _BLOCK,), key, tf.concat([tf.cast(begin // _BLOCK, tf.uint64)[None], high], 0), tf.uint32)
        return tf.slice(drawn, [begin % _BLOCK], [size])

    return tf.map_fn(row, tf.convert_to_tensor(rows), fn_output_signature=tf.TensorSpec((size,), tf.uint32))


def uniform(seed: Array, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
    """Uniform float32 numbers from `low` to `high`, equal under every compiler.

    In float32, some compilers fuse the multiplication and the addition and others do not. In
    float64 the product of two 24-bit numbers is exact, so fusing has no effect. Each value is
    rounded to float32 once.
    """
    span = float(np.float32(high - low))
    return tf.cast(float(np.float32(low)) + span * _unit(bits(seed, shape)), tf.float32)


def _unit(drawn: Array) -> Array:
    """Maps integers to float64 numbers in `[0, 1)`, using their upper 24 bits."""
    return tf.cast(tf.bitwise.right_shift(drawn, tf.constant(8, tf.uint32)), tf.float64) * 2.0**-24


def normal(seed: Array, shape: tuple[int, ...], rows: Array | None = None) -> Array:
    """Standard normal float32 numbers by the Box-Muller transform.

    Args:
        seed: a seed.
        shape: shape of the array.
        rows: indices `[n]` of the rows to draw; `None` draws all.
    """
    if rows is None:
        pair = uniform(seed, (2, *shape))
    else:
        rows = tf.convert_to_tensor(rows)
        drawn = bits_of_rows(seed, tf.concat([rows, rows + shape[0]], 0), math.prod(shape[1:]))
        pair = tf.cast(tf.reshape(_unit(drawn), (2, -1, *shape[1:])), tf.float32)
    radius = tf.sqrt(-2.0 * tf.math.log1p(-pair[0]))
    return radius * tf.cos(2.0 * math.pi * pair[1])


def integers(seed: Array, shape: tuple[int, ...], limit: int) -> Array:
    """Uniform int32 numbers from 0 to `limit - 1`."""
    return tf.cast(tf.math.floormod(bits(seed, shape), tf.constant(limit, tf.uint32)), tf.int32)


def permutation(seed: Array, size: int, leading: tuple[int, ...] = ()) -> Array:
    """Random permutations of `range(size)`: `[*leading, size]`."""
    keys = tf.cast(bits(seed, (*leading, size)), tf.int64)
    return tf.argsort(keys, stable=True)
