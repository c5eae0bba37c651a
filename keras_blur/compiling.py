"""Compiled functions that may be traced for many shapes.

TensorFlow warns of a function that it traces often, since that mostly is a mistake. Here it is not: each family of tasks and
networks, and each length of a block of steps, has a shape and a program of its own, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def compiled(function: Callable[..., Any], *, jit_compile: bool = True) -> Callable[..., Any]:
    """A function of nests of tensors, compiled once for each combination of shapes and dtypes.

    Args:
        function: takes and returns nests of tensors.
        jit_compile: whether XLA compiles it.

    Example:

    >>> double = compiled(lambda x: 2 * x)
    >>> [double(tf.ones(n)).shape[0] for n in (1, 2, 1)]
    [1, 2, 1]
    """
    wrapped = tf.function(function, jit_compile=jit_compile)
    traced: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        key = tuple((tuple(leaf.shape), leaf.dtype) for leaf in tf.nest.flatten(arguments))
        if key not in traced:
            traced[key] = wrapped.get_concrete_function(*arguments)
        return traced[key](*arguments)

    return call
