"""Compiled functions that may be traced for many shapes; and whether a TPU has every operation of a traced one.

TensorFlow warns of a function that it traces often, since that mostly is a mistake. Here it is not: each family of tasks and
networks, and each length of a block of steps, has a shape and a program of its own, once.
"""

from __future__ import annotations

import collections
import functools
import importlib.resources
import json
from collections.abc import Callable, Iterable
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
    wrapped = tf.function(function, autograph=False, jit_compile=jit_compile)
    traced: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        key = tuple((tuple(leaf.shape), leaf.dtype) for leaf in tf.nest.flatten(arguments))
        if key not in traced:
            traced[key] = wrapped.get_concrete_function(*arguments)
        return traced[key](*arguments)

    return call


def operations(function: Any) -> collections.Counter[str]:
    """How often each operation stands in a traced function and all that it calls.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.

    Example:

    >>> @tf.function
    ... def double(x):
    ...     return 2 * x
    >>> operations(double.get_concrete_function(tf.TensorSpec(3)))["Mul"]
    1
    """
    graph = function.graph.as_graph_def()
    library = {one.signature.name: one for one in graph.library.function}
    found: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()

    def walk(nodes: Iterable[Any]) -> None:
        for node in nodes:
            found[node.op] += 1
            for value in node.attr.values():
                for called in (value.func, *value.list.func):
                    if called.name and called.name not in seen:
                        seen.add(called.name)
                        walk(library[called.name].node_def)

    walk(graph.node)
    return found


def without_tpu_kernel(function: Any) -> dict[str, int]:
    """Operations of a traced function that no TPU kernel exists for, and how often each stands there.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.

    Example:

    >>> @tf.function
    ... def shout(x):
    ...     return tf.strings.upper(x)
    >>> without_tpu_kernel(shout.get_concrete_function(tf.TensorSpec([], tf.string)))
    {'StringUpper': 1}
    """
    return {name: count for name, count in operations(function).items() if name not in _of_tpu()}


@functools.cache
def _of_tpu() -> frozenset[str]:
    text = importlib.resources.files("keras_blur").joinpath("tpu_kernels.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["operations"]) | {"Placeholder"}  # what an argument is before lowering
