"""Gradients, Jacobians and their transposes on JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Array = Any


def vjp(function: Callable[..., Array], *inputs: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The value of a function, and its transposed Jacobian as a function of a cotangent."""
    return jax.vjp(function, *inputs)


def jvp(function: Callable[..., Array], inputs: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    """The value of a function, and its Jacobian times a tangent."""
    return jax.jvp(function, tuple(inputs), tuple(tangents))


def gradient(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """The second result of a function, and the gradient of its first, a scalar."""
    found, extra = jax.grad(function, has_aux=True)(arrays)
    return extra, found


def stored(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`: on JAX `recomputed` itself finds what is costly."""
    return function(*arrays)


def recomputed(function: Callable[..., Any], *, stores_costly: bool = False) -> Callable[..., Any]:
    """A function of trees of arrays that stores little for its gradient but its arguments.

    With `stores_costly` it stores the results of products and factorisations. The rest is computed
    again: stored, it would be some forty arrays for a learning step, many of them copies of one
    another in other shapes, and writing them would take longer than computing them.
    """
    if not stores_costly:
        return jax.checkpoint(function)
    return jax.checkpoint(function, policy=_is_costly, prevent_cse=False)  # a loop prevents it already


def _is_costly(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name in ("dot_general", "conv_general_dilated", "cholesky", "triangular_solve")


def pullback(function: Callable[[Any], Mapping[str, Array]], arrays: Any) -> tuple[dict[str, Array], Callable[..., Any]]:
    """The values of a function, and its transposed Jacobian, which computes only what is asked
    for."""
    values, tangents = jax.linearize(lambda arrays: dict(function(arrays)), arrays)

    def pull(cotangents: Mapping[str, Array], names: Sequence[str] | None = None) -> Any:
        def chosen(arrays: Any) -> dict[str, Array]:  # `jax.vjp` would carry zeros of the others through
            found = tangents(arrays)
            return {name: found[name] for name in cotangents}

        (found,) = jax.linear_transpose(chosen, arrays)(dict(cotangents))
        return found if names is None else {name: found[name] for name in names}  # the compiler drops the others

    return values, pull


def gradient_for_keras(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """`gradient`: Keras's `fit` gives an optimizer the same on JAX."""
    return gradient(function, arrays)


def dense(gradient: Any) -> Array:
    """The gradient itself."""
    return gradient
