"""Random numbers from a seed alone, equal on both backends and under every compiler."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_blur.backend import bits

Array = Any


def uniform(seed: Array, shape: tuple[Any, ...]) -> Array:
    """Uniform float32 numbers from 0 to 1, multiples of 2**-24.

    Args:
        seed: two 32-bit integers.
        shape: of the array.
    """
    upper = ops.right_shift(bits(seed, shape), ops.cast(8, "uint32"))
    return ops.cast(upper, "float32") * 2.0**-24
