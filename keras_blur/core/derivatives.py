"""Jacobians of functions of arrays, and transposes of linear ones.

A kind of connection defines one bilinear map. Its transpose and its outer product are derived here,
so each backend uses its own kernels for them: the transpose of a convolution is the backend's, not
one of ours.

`matmul` and `einsum` are costly. An unrolled step stores their results for its gradient and
computes the rest of the step again.

`tanh` and `mean` are here because those of `keras.ops` round float64 to float32 on JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_blur.backend import by_operation, jvp, mean, stored, tanh, vjp

Array = Any

__all__ = ["by_operation", "einsum", "jvp", "matmul", "mean", "stored", "tanh", "transpose", "vjp"]


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices, which an unrolled step stores for its gradient."""
    return stored(ops.matmul, a, b)


def einsum(equation: str, a: Array, b: Array) -> Array:
    """A product by an equation, which an unrolled step stores for its gradient."""
    return stored(lambda a, b: ops.einsum(equation, a, b), a, b)


def transpose(linear: Callable[[Array], Array], shape: tuple[Any, ...], y: Array) -> Array:
    """The transpose of a linear function, applied to y.

    Args:
        linear: a linear function from an array of `shape` to one of y's shape.
        shape: shape of the argument of the function.
        y: an array, of the shape of the function's value. The result has shape `shape`.

    Example:

    >>> tuple(transpose(lambda x: ops.stack([x[0] + x[1], x[1]]), (2,), ops.ones(2)).shape)
    (2,)
    """
    return vjp(linear, ops.zeros(shape, dtype=y.dtype))[1](y)[0]
