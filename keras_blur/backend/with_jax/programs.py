"""Functions compiled as programs, and what they are made of, on JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def loop(count: int, body: Callable[..., tuple[Any, ...]], *carried: Any, stores_costly: bool = True) -> tuple[Any, ...]:
    """Carries trees of arrays through a fixed number of steps, with a gradient.

    For the gradient it stores what is carried and, with `stores_costly`, the results of costly
    operations. The others are computed again: stored, they would be some forty arrays a step, many
    of them copies of one another in other shapes, and writing them would take longer than computing
    them. Without `stores_costly`, the body decides what it stores.
    """

    def step(carried: tuple[Any, ...], number: Array) -> tuple[tuple[Any, ...], None]:
        return tuple(body(number, *carried)), None

    if stores_costly:
        step = jax.checkpoint(step, policy=_is_costly, prevent_cse=False)  # a scan prevents it already
    return jax.lax.scan(step, tuple(carried), jnp.arange(count, dtype=jnp.int32))[0]


def _is_costly(operation: Any, *_: Any, **__: Any) -> bool:
    """Whether the result of an operation is stored for the gradient of a loop."""
    return operation.name in ("dot_general", "conv_general_dilated", "cholesky", "triangular_solve")


def compiled(function: Callable[..., Any], *, jit_compile: bool = True) -> Callable[..., Any]:
    """Compiles a function of trees of arrays; there are no programs on JAX that XLA does not
    compile."""
    del jit_compile
    return jax.jit(function)


def one_by_one(function: Callable[..., Any], arrays: Any, like: Any) -> Any:
    """The values of a function of a tree at each place of the first axis of its arrays."""
    del like
    return jax.lax.map(function, arrays)


def branch(index: Array, functions: Sequence[Callable[[], Any]]) -> Any:
    """The result of one of several functions of no arguments; the others are not computed."""
    return jax.lax.switch(index, list(functions))
