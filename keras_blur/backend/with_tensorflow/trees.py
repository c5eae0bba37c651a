"""Arrays of Keras variables, and trees of arrays, on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Array = Any


def register(kind: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a tree of arrays for `tf.function` and `tf.nest`.

    Args:
        kind: the class.
        flatten: maps an object to its static, hashable part and a tuple of arrays.
        unflatten: the inverse of `flatten`.
    """
    kind.__tf_flatten__ = flatten  # type: ignore[attr-defined]
    kind.__tf_unflatten__ = classmethod(lambda _, static, arrays: unflatten(static, arrays))  # type: ignore[attr-defined]


def value_of(variable: Any) -> Array:
    """The value of a Keras variable as an array of the program that reads it."""
    return tf.convert_to_tensor(variable.value)


def numbers_of(variable: Any) -> np.ndarray:
    """The value of a Keras variable, outside of programs."""
    return np.asarray(variable.numpy())


def leaves(tree: Any) -> list[Array]:
    """The arrays of a tree in order."""
    return tf.nest.flatten(tree)


def pack(like: Any, arrays: Sequence[Array]) -> Any:
    """A tree of the structure of another, with these arrays; the inverse of `leaves`."""
    return tf.nest.pack_sequence_as(like, arrays)


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """A tree of the values of a function of the arrays of trees."""
    return tf.nest.map_structure(function, *trees)
