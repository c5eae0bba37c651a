"""TensorFlow programs for a TPU: branches with constants, and operations without a TPU kernel."""

from __future__ import annotations

import collections
import functools
import importlib.resources
import json
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf


def with_own_constants(function: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a branch of `tf.cond` that copies the constants it captures.

    A captured value becomes an argument of the branch. Second-order gradients capture shapes, which
    XLA must know at compile time. On a TPU it cannot read them from an argument.

    Args:
        function: a function without arguments that returns a nest of tensors.

    Example:

    >>> shape = tf.constant([1])
    >>> choose = tf.function(lambda x: tf.cond(x > 0.0, with_own_constants(lambda: tf.reshape(x, shape)), lambda: x[None]))
    >>> choose(tf.constant(2.0)).numpy().tolist()
    [2.0]
    """

    def branch() -> Any:
        if tf.executing_eagerly():
            return function()
        traced = tf.function(function, autograph=False).get_concrete_function()
        given = zip(traced.inputs, traced.captured_inputs, strict=True)
        inside = {}
        for placeholder, outside in given:
            value = None if outside.dtype == tf.resource else tf.get_static_value(outside)
            inside[placeholder.name] = tf.identity(outside) if value is None else tf.constant(value)
        graph = traced.graph.as_graph_def()
        arguments = {name.split(":")[0] for name in inside}
        nodes = [node for node in graph.node if node.name not in arguments]
        for node in nodes:  # the gradient of a gather wants to be where its input is, which may be outside
            node.attr.pop("_class", None)
        del graph.node[:]
        graph.node.extend(nodes)
        names = [output.name for output in traced.outputs]
        results = tf.graph_util.import_graph_def(graph, inside, names, name="branch")
        for result, output in zip(results, traced.outputs, strict=True):
            result.set_shape(output.shape)
        return tf.nest.pack_sequence_as(traced.structured_outputs, results)

    return branch


def operations(function: Any) -> collections.Counter[str]:
    """Counts the operations in a traced function and in all functions it calls.

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
    """Counts the operations of a traced function that have no TPU kernel.

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
