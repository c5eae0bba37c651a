"""Functions compiled as programs, and what they are made of, on TensorFlow."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops  # TensorFlow does not export its table of gradients

Array = Any

_BY_XLA = contextvars.ContextVar("_BY_XLA", default=False)
_FORGETTING = contextvars.ContextVar("_FORGETTING", default=False)


def by_xla() -> bool:
    """Whether what is traced now is part of a program of `compiled` that XLA compiles."""
    return _BY_XLA.get()


@contextlib.contextmanager
def _tracing(jit_compile: bool) -> Iterator[None]:
    before = _BY_XLA.set(by_xla() or jit_compile)
    try:
        yield
    finally:
        _BY_XLA.reset(before)


@contextlib.contextmanager
def forgetting_gradients() -> Iterator[None]:
    """Drops what `tf.custom_gradient` registers while a program is traced.

    TensorFlow never drops it, and it holds the graph: each trace would stay in memory. Inside of
    another such scope it is kept, since the outer program may still differentiate the inner one.
    """
    table = ops.gradient_registry._registry
    known, outermost = len(table), not _FORGETTING.get()
    before = _FORGETTING.set(True)
    try:
        yield
    finally:
        _FORGETTING.reset(before)
        if outermost:
            for name in list(table)[known:]:
                if name.startswith("CustomGradient"):
                    del table[name]


def loop(count: int, body: Callable[..., tuple[Any, ...]], *carried: Any) -> tuple[Any, ...]:
    """Carries trees of arrays through a fixed number of steps, with a gradient.

    It is one loop of the program, whose compile time does not depend on the count. For the gradient
    it stores all that the backward pass of the body reads.

    Args:
        count: number of steps.
        body: takes the number of the step, an int32 array, and the carried trees. It returns trees
            of the same shapes and dtypes.
        *carried: the trees before the first step.

    Returns:
        The trees after the last step.

    Example:

    >>> [float(x) for x in loop(3, lambda number, x: (2.0 * x,), tf.constant(1.0))]
    [8.0]
    """
    _, *after = tf.while_loop(
        lambda number, *_: number < count,
        lambda number, *carried: (number + 1, *body(number, *carried)),
        (tf.constant(0), *carried),
        maximum_iterations=count,
    )
    return tuple(after)


def compiled(function: Callable[..., Any], *, jit_compile: bool = True) -> Callable[..., Any]:
    """Compiles a function of trees of arrays once for each combination of shapes and dtypes.

    TensorFlow warns about functions that are retraced often. Here that is intended: each family of
    tasks and networks, and each number of steps, has its own shapes and is traced once.

    Args:
        function: a function from trees of arrays to a tree of arrays.
        jit_compile: whether XLA compiles it.

    Returns:
        The compiled function. After `tf.config.run_functions_eagerly(True)` it calls `function`
        itself.

    Example:

    >>> double = compiled(lambda x: 2 * x)
    >>> [double(tf.ones(n)).shape[0] for n in (1, 2, 1)]
    [1, 2, 1]
    """
    wrapped = tf.function(function, autograph=False, jit_compile=jit_compile)
    traced: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        if tf.config.functions_run_eagerly():
            return function(*arguments)
        key = tuple((tuple(leaf.shape), leaf.dtype) for leaf in tf.nest.flatten(arguments))
        if key not in traced:
            with _tracing(jit_compile), forgetting_gradients():
                traced[key] = wrapped.get_concrete_function(*arguments)
        return traced[key](*arguments)

    return call


def one_by_one(function: Callable[..., Any], arrays: Any, like: Any) -> Any:
    """The values of a function of a tree at each place of the first axis of its arrays.

    It is one loop of the program. `ops.map` is the same, but traces the function twice.

    Args:
        function: a function from a tree of arrays to a tree of arrays.
        arrays: a tree of arrays with the first axis.
        like: a tree like a value of the function, of anything with a shape and a dtype.

    Returns:
        A tree like `like`, of arrays with the first axis.

    Example:

    >>> numbers = tf.constant([1.0, 2.0])
    >>> one_by_one(lambda x: x * x, numbers, like=numbers[0]).numpy().tolist()
    [1.0, 4.0]
    """
    specs = tf.nest.map_structure(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), like)
    return tf.map_fn(function, arrays, fn_output_signature=specs)


def branch(index: Array, functions: Sequence[Callable[[], Any]]) -> Any:
    """The result of one of several functions of no arguments; the others are not computed.

    Args:
        index: which, an int32 scalar.
        functions: functions that give trees of arrays of the same shapes and dtypes.

    Example:

    >>> float(branch(tf.constant(1), [lambda: tf.constant(2.0), lambda: tf.constant(3.0)]))
    3.0
    """
    return tf.switch_case(index, [_with_own_constants(one) for one in functions])


def _with_own_constants(function: Callable[[], Any]) -> Callable[[], Any]:
    """A branch that copies the constants it captures.

    A captured value becomes an argument of the branch. Second-order gradients capture shapes, which
    XLA must know at compile time. On a TPU it cannot read them from an argument.
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
