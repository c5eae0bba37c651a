"""Random numbers that depend only on a seed.

The numbers are identical bit for bit, whatever the backend, the device, the compiler, the number of
replicas and earlier draws. All of them follow from the integers of the Philox generator
(`backend.bits`). Floats are made from these by operations that every compiler rounds alike: a
conversion of integers to float32, and products that are exact in float32, so that fusing one with a
sum changes nothing. There is no sum of several floats, since compilers reorder those.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import numpy as np
from keras import ops

from keras_blur import backend

Array = Any

_BITS = 32  # bits of a random integer
_UPPER = 2**32 - 2**8  # the upper 24 bits of these, as many as a float32 has
_INDEX = 16  # bits of a number of the table of normal quantiles
_POINT = 28  # bits after the binary point in that table: the sum of two fits in 32 bits


def seed_of(number: int | Array) -> Array:
    """Makes a seed, a pair of int32, from a 32-bit integer.

    Args:
        number: an integer from -2**31 to 2**31 - 1, or an integer tensor.

    Raises:
        ValueError: if a number is no integer, or does not fit in 32 bits.

    Example:

    >>> ops.convert_to_numpy(seed_of(7)).tolist()
    [0, 7]
    """
    fractional = isinstance(number, (float, np.floating))
    if fractional or (isinstance(number, (int, np.integer)) and not -(2**31) <= number < 2**31):
        raise ValueError(f"A seed must be an integer that fits in 32 bits, from -2**31 to 2**31 - 1. Received: {number}")
    return ops.stack([ops.zeros((), "int32"), ops.cast(number, "int32")])


def fold_in(seed: Array, *path: int | Array) -> Array:
    """Derives a seed from a seed and numbers such as a step, a member or a purpose.

    Args:
        seed: a seed.
        *path: integers, or integer tensors, folded in one after the other.

    Example:

    >>> tuple(fold_in(seed_of(0), 3, 1).shape)
    (2,)
    """
    for number in path:
        seed = ops.stack([backend.bits(seed, (), "int32"), ops.cast(number, "int32")])
    return seed


def bits(seed: Array, shape: tuple[Any, ...]) -> Array:
    """Uniform 32-bit integers, uint32.

    Args:
        seed: a seed.
        shape: shape of the array.

    Example:

    >>> tuple(bits(seed_of(0), (2, 3)).shape)
    (2, 3)
    """
    return backend.bits(seed, shape)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Draws selected rows of `bits(seed, [n, size])` without the others: `[rows, size]`.

    Philox computes each block of integers from the block's index alone, so a row can start
    anywhere. On JAX, the last row must end before integer 2**32.

    Args:
        seed: a seed.
        rows: indices `[rows]` of the rows to draw.
        size: size of a row.

    Example:

    >>> seed = seed_of(0)
    >>> some = ops.take(bits(seed, (6, 3)), ops.array([2, 5]), axis=0)
    >>> bool(ops.all(bits_of_rows(seed, [2, 5], 3) == some))
    True
    """
    return backend.bits_of_rows(seed, rows, size)


def uniform(seed: Array, shape: tuple[Any, ...], low: float = 0.0, high: float = 1.0) -> Array:
    """Uniform float32 numbers from `low` to `high`, from the upper 24 bits of each integer.

    If the width of the range is a power of two, products are exact, and each number is rounded
    once. For any other range, the numbers are first computed as integers, of 31 bits and a sign.

    Args:
        seed: a seed.
        shape: shape of the array.
        low, high: bounds, as Python numbers, of which the larger in size is at least 2**-90.

    Raises:
        ValueError: if the bounds are out of order, not finite or too small.

    Example:

    >>> drawn = uniform(seed_of(0), (100,), -1.0, 1.0)
    >>> bool(ops.all(drawn >= -1.0)), bool(ops.all(drawn <= 1.0))
    (True, True)
    """
    given = low, high
    low, high = float(np.float32(low)), float(np.float32(high))
    size = max(abs(low), abs(high))
    if not (low <= high and size >= 2.0**-90 and math.isfinite(high - low)):
        raise ValueError(
            "`low` and `high` must be finite, in order, and the larger in size at least 2**-90. Received: low={}, "
            "high={}".format(*given)
        )
    upper = ops.bitwise_and(bits(seed, shape), _word(_UPPER))
    if math.frexp(high - low)[0] == 0.5:  # a power of two, whose products are exact
        return low + ops.cast(upper, "float32") * ((high - low) * 2.0**-_BITS)
    point = _BITS - 1 - math.frexp(size)[1]
    first, last = math.ceil(math.ldexp(low, point)), math.floor(math.ldexp(high, point))
    place = backend.upper_product(upper, last - first) + _word(first % 2**_BITS)
    return ops.cast(ops.cast(place, "int32"), "float32") * 2.0**-point


def _word(number: int) -> Array:
    return ops.cast(number, "uint32")


def normal(seed: Array, shape: tuple[int, ...], rows: Array | None = None) -> Array:
    """Standard normal float32 numbers.

    Each number is the sum of two quantiles of the normal distribution, which the two halves of an
    integer choose from a table of 2**16. The table holds integers, so the sum is exact and is
    rounded once. The numbers have mean 0, variance 1 and an excess kurtosis of -0.0004, and reach
    to 6.1. Beyond 4 there are 98 % as many as there should be, beyond 5 83 %.

    Args:
        seed: a seed.
        shape: shape of the array.
        rows: indices `[n]` of the rows to draw; `None` draws all.

    Example:

    >>> tuple(normal(seed_of(0), (4, 3), rows=[1, 2]).shape)
    (2, 3)
    """
    if rows is None:
        drawn = bits(seed, shape)
    else:
        drawn = ops.reshape(bits_of_rows(seed, rows, math.prod(shape[1:])), (-1, *shape[1:]))
    table = ops.convert_to_tensor(_quantiles())
    first, second = ops.right_shift(drawn, _word(_INDEX)), ops.bitwise_and(drawn, _word(2**_INDEX - 1))
    total = ops.take(table, ops.cast(first, "int32"), axis=0) + ops.take(table, ops.cast(second, "int32"), axis=0)
    return ops.cast(total, "float32") * 2.0**-_POINT


@functools.cache
def _quantiles() -> np.ndarray:
    """Quantiles of the normal distribution with variance 1/2, `[2**16]` int32 with 28 bits after
    the binary point."""
    size = 2**_INDEX
    standard = statistics.NormalDist()
    upper = np.array([standard.inv_cdf((place + 0.5) / size) for place in range(size // 2, size)])
    scale = math.sqrt(0.5 * len(upper) / math.fsum(upper**2))
    upper = np.round(upper * scale * 2**_POINT).astype(np.int32)
    return np.concatenate([-upper[::-1], upper])


def integers(seed: Array, shape: tuple[int, ...], limit: int) -> Array:
    """Uniform int32 numbers from 0 to `limit - 1`.

    They are the remainders of 32-bit integers, so the probabilities of two numbers differ by a
    factor of at most `1 + limit / 2**32`.

    Args:
        seed: a seed.
        shape: shape of the array.
        limit: a number from 1 to 2**24.

    Raises:
        ValueError: if `limit` is out of range.

    Example:

    >>> bool(ops.all(integers(seed_of(0), (100,), 6) < 6))
    True
    """
    if not 1 <= limit <= 2**24:
        raise ValueError(f"`limit` must be from 1 to 2**24. Received: limit={limit}")
    return ops.cast(ops.mod(bits(seed, shape), _word(limit)), "int32")


def permutation(seed: Array, size: int, leading: tuple[int, ...] = ()) -> Array:
    """Random permutations of `range(size)`, int32: `[*leading, size]`.

    Args:
        seed: a seed.
        size: number of elements of a permutation.
        leading: sizes of the leading axes, along which permutations are independent.

    Example:

    >>> sorted(ops.convert_to_numpy(permutation(seed_of(0), 4)).tolist())
    [0, 1, 2, 3]
    """
    return order(bits(seed, (*leading, size)))


def order(keys: Array) -> Array:
    """The indices that sort uint32 numbers along the last axis, int32; equal numbers keep their
    order.

    Args:
        keys: uint32 numbers `[..., n]`.

    Example:

    >>> ops.convert_to_numpy(order(ops.array([[2**31, 5, 5]], "uint32"))).tolist()
    [[1, 2, 0]]
    """
    signed = ops.cast(ops.bitwise_xor(keys, _word(2**31)), "int32")  # the order of the unsigned numbers
    return ops.cast(ops.argsort(signed, axis=-1), "int32")
