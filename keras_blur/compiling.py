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


def with_own_constants(function: Callable[[], Any]) -> Callable[[], Any]:
    """A branch of a conditional that has its own copy of each constant that it takes from outside.

    What a branch takes from outside is an argument of it. Gradients of gradients take shapes from outside; XLA has to know
    them when it compiles, and of an argument, on a TPU, does not.

    Args:
        function: of no arguments, to a nest of tensors.

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
