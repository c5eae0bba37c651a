"""Random numbers that depend on a seed alone: not on the device, the compiler, the number of replicas, or what ran before.

Only integers of the Philox generator are drawn from TensorFlow; they are equal under its own kernels, XLA and the TPU
lowering, which floating-point draws are not. Floats are made from their upper bits here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

Array = Any


def seed_of(number: int | Array) -> Array:
    """A seed, a pair of integers, from one integer of 32 bits."""
    if isinstance(number, int) and not -(2**31) <= number < 2**31:
        raise ValueError(f"A seed must fit in 32 bits, from -2**31 to 2**31 - 1. Received: {number}")
    return tf.stack([tf.zeros((), tf.int32), tf.cast(number, tf.int32)])


def fold_in(seed: Array, *numbers: int | Array) -> Array:
    """A seed for each combination of numbers (a step, a member, a purpose)."""
    for number in numbers:
        seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(number, tf.int32), alg="philox")
    return seed


def bits(seed: Array, shape: tuple[int, ...]) -> Array:
    """Uniform 32-bit integers."""
    return tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")


def uniform(seed: Array, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
    """Uniform float32 numbers from `low` to `high`, rounded once, so that each compiler gives the same.

    In float32 one compiler fuses the multiplication and the addition and another does not; in float64 the product of
    two 24-bit numbers is exact, and fusing changes nothing.
    """
    unit = tf.cast(tf.bitwise.right_shift(bits(seed, shape), tf.constant(8, tf.uint32)), tf.float64) * 2.0**-24
    span = float(np.float32(high - low))
    return tf.cast(float(np.float32(low)) + span * unit, tf.float32)


def normal(seed: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 numbers, by the Box-Muller transform."""
    pair = uniform(seed, (2, *shape))
    radius = tf.sqrt(-2.0 * tf.math.log1p(-pair[0]))
    return radius * tf.cos(2.0 * math.pi * pair[1])


def integers(seed: Array, shape: tuple[int, ...], limit: int) -> Array:
    """Uniform int32 numbers from 0 to `limit - 1`."""
    return tf.cast(tf.math.floormod(bits(seed, shape), tf.constant(limit, tf.uint32)), tf.int32)


def permutation(seed: Array, size: int) -> Array:
    """A random order of `size` things."""
    keys = tf.cast(bits(seed, (size,)), tf.int64)
    return tf.argsort(keys, stable=True)
