"""Functions compiled as programs, and what they are made of, on JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def loop(count: int, body: Callable[..., tuple[Any, ...]], *carried: Any) -> tuple[Any, ...]:
    """Carries trees of arrays through a fixed number of steps, with a gradient."""

    def step(carried: tuple[Any, ...], number: Array) -> tuple[tuple[Any, ...], None]:
        return tuple(body(number, *carried)), None

    return jax.lax.scan(step, tuple(carried), jnp.arange(count, dtype=jnp.int32))[0]


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
