"""Arrays of Keras variables, and trees of arrays, on JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Array = Any


def register(kind: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a tree of arrays for `jit`, `grad` and `vmap`."""

    def swapped(value: Any) -> tuple[Any, Any]:
        static, arrays = flatten(value)
        return arrays, static

    jax.tree_util.register_pytree_node(kind, swapped, unflatten)


def value_of(variable: Any) -> Array:
    """The value of a Keras variable."""
    return variable.value


def numbers_of(variable: Any) -> np.ndarray:
    """The value of a Keras variable, outside of programs; its own `numpy` warns under NumPy 2."""
    return np.array(variable.value)


def leaves(tree: Any) -> list[Array]:
    """The arrays of a tree in order."""
    return jax.tree.leaves(tree)


def pack(like: Any, arrays: Sequence[Array]) -> Any:
    """A tree of the structure of another, with these arrays; the inverse of `leaves`."""
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """A tree of the values of a function of the arrays of trees."""
    return jax.tree.map(function, *trees)
