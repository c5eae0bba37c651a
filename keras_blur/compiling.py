"""TensorFlow programs for a TPU: their operations, and those without a TPU kernel."""

from __future__ import annotations

import collections
import functools
import importlib.resources
import json
from collections.abc import Iterable
from typing import Any


def operations(function: Any) -> collections.Counter[str]:
    """Counts the operations in a traced function and in all functions it calls.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.

    Example:

    >>> import tensorflow as tf
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
    """Counts the operations of a traced function that have no TPU kernel.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.

    Example:

    >>> import tensorflow as tf
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
