"""Gradients, Jacobians and their transposes on TensorFlow."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Array = Any


def vjp(function: Callable[..., Array], *inputs: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The value of a function, and its transposed Jacobian as a function of a cotangent.

    Args:
        function: a function from arrays to one array.
        *inputs: where to take the Jacobian.

    Returns:
        The value, and a function from an array of the value's shape to one array for each input. It
        may be called several times.

    Example:

    >>> value, pull = vjp(lambda x: x * x, tf.constant(3.0))
    >>> float(value), float(pull(tf.constant(2.0))[0])
    (9.0, 12.0)
    """
    points = [tf.convert_to_tensor(value) for value in inputs]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(points)
        value = function(*points)

    def pull(cotangent: Array) -> tuple[Array, ...]:
        with _known_orders():
            found = tape.gradient(
                value, points, output_gradients=cotangent, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
        return tuple(found)

    return value, pull


@tf.RegisterGradient("KerasBlurTranspose")
def _transpose_gradient(operation: Any, gradient: Array) -> tuple[Array, None]:
    """TensorFlow's gradient of a transposition, with an order that is known when a graph is
    made."""
    order = _known_order(operation.inputs[1])
    if order is None:
        return tf.transpose(gradient, tf.math.invert_permutation(operation.inputs[1])), None
    return tf.transpose(gradient, np.argsort(order)), None


def _known_order(order: Array) -> np.ndarray | None:
    """The order of a transposition, if it is a constant or the inverse of one."""
    if order.op.type != "InvertPermutation":
        return tf.get_static_value(order)
    known = _known_order(order.op.inputs[0])
    return None if known is None else np.argsort(known)


def _known_orders() -> Any:
    """A scope whose transpositions have a gradient that XLA compiles in a loop.

    TensorFlow's own gradient inverts their order when the program runs, but XLA must know it at
    compile time. So the second derivative of a transposition would not compile.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    return tf.compat.v1.get_default_graph().gradient_override_map({"Transpose": "KerasBlurTranspose"})


def jvp(function: Callable[..., Array], inputs: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    """The value of a function, and its Jacobian times a tangent.

    The Jacobian is the transpose of the transposed one, so every operation with a second derivative
    has it, under XLA as well; forward accumulators do not compile there.

    Raises:
        ValueError: if the function has no second derivative on TensorFlow.

    Example:

    >>> value, change = jvp(lambda x: x * x, [tf.constant(3.0)], [tf.constant(2.0)])
    >>> float(value), float(change)
    (9.0, 12.0)
    """
    points = [tf.convert_to_tensor(value) for value in inputs]
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(points)
            value = function(*points)
        cotangent = tf.zeros_like(value)
        outer.watch(cotangent)
        # The inner gradient is recorded by the outer tape, as a linear function of the cotangent.
        with _known_orders():
            back = inner.gradient(value, points, output_gradients=cotangent)
    used = [(one, tangent) for one, tangent in zip(back, tangents, strict=True) if one is not None]
    if not used:  # the value does not depend on the inputs
        return value, tf.zeros_like(value)
    with _known_orders():
        moved = outer.gradient([one for one, _ in used], cotangent, output_gradients=[tangent for _, tangent in used])
    if moved is None:
        raise ValueError(
            "A layer or operation without weights must have a second derivative on TensorFlow for the other states to go "
            f"through it. Received: {getattr(function, '__name__', function)!r}, which has none"
        )
    return value, moved


def gradient(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """The gradient of a function's first result, a scalar.

    Args:
        function: a function from a tree of arrays to a scalar and a tree of anything else.
        arrays: where to take the gradient.

    Returns:
        The second result, and a tree like `arrays` of gradients, which are zero where the scalar
        does not depend on an array.

    Example:

    >>> _, found = gradient(lambda x: (x["a"] ** 2, ()), {"a": tf.constant(3.0), "b": tf.constant(1.0)})
    >>> float(found["a"]), float(found["b"])
    (6.0, 0.0)
    """
    arrays = tf.nest.map_structure(tf.convert_to_tensor, arrays)
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        value, extra = function(arrays)
    with _known_orders():
        return extra, tape.gradient(value, arrays, unconnected_gradients="zero")


class _Storage:
    """The results that a function computes once and its backward pass reads.

    A function stores what is computed in its own graph; the body of a loop inside has another.
    """

    def __init__(self) -> None:
        self.results: list[Array] = []
        self._again: Iterator[Array] | None = None
        self._graph: Any = None

    @contextlib.contextmanager
    def used(self, *, again: bool) -> Iterator[None]:
        """A scope in which `stored` stores results, or `again` reads them in the same order."""
        if not again:
            self.results.clear()
        self._again, self._graph = iter(self.results) if again else None, _graph()
        before = _STORAGE.set(self)
        try:
            yield
        finally:
            _STORAGE.reset(before)

    def result(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """As `stored`."""
        if _graph() is not self._graph:
            return function(*arrays)
        if self._again is None:
            self.results.append(_unstored(function, *arrays))
            return self.results[-1]
        result = next(self._again)

        @tf.custom_gradient
        def read(*arrays: Array) -> Any:
            def backward(upstream: Array) -> list[Array]:
                here = [tf.identity(one) for one in arrays]  # two arguments may be one tensor
                with tf.GradientTape() as tape:
                    tape.watch(here)
                    value = _unstored(function, *here)  # not executed where its gradient does not read it
                with _known_orders():
                    return tape.gradient(value, here, output_gradients=upstream, unconnected_gradients="zero")

            return tf.identity(result), backward

        return read(*arrays)


_STORAGE: contextvars.ContextVar[_Storage | None] = contextvars.ContextVar("_STORAGE", default=None)


def _graph() -> Any:
    """The graph that is traced now; `None` outside of one."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _unstored(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`, which stores nothing inside."""
    before = _STORAGE.set(None)
    try:
        return function(*arrays)
    finally:
        _STORAGE.reset(before)


def stored(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`, whose value `recomputed(..., stores_costly=True)` stores.

    Args:
        function: a costly function from floating-point arrays to one array. Like that of
            `recomputed`, it must not capture arrays that need a gradient.
        *arrays: its arguments.

    Example:

    >>> stored(tf.matmul, tf.ones((1, 2)), tf.ones((2, 1))).numpy().tolist()
    [[2.0]]
    """
    storage = _STORAGE.get()
    return function(*arrays) if storage is None else storage.result(function, *arrays)


def recomputed(function: Callable[..., Any], *, stores_costly: bool = False) -> Callable[..., Any]:
    """A function of trees of arrays that stores little for its gradient but its arguments.

    The backward pass computes the function again.

    Args:
        function: a function from trees of arrays to a tree of arrays. It must not capture arrays
            that need a gradient.
        stores_costly: whether the results of costly operations are stored, those of `stored`. What
            remains to be computed again is mostly elementwise. If not, nothing is stored.
    """

    def call(*arguments: Any) -> Any:
        given = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(arguments)]
        kept: list[Any] = []  # the tree of results, with all that is not floating-point
        storage = _Storage() if stores_costly else None

        # Only floating-point tensors have a gradient. The others are captured, and left in `kept`,
        # as a cast to a float would round large integers.
        def run(*floats: Array, again: bool = False) -> list[Array]:
            numbers = iter(floats)
            full = [next(numbers) if leaf.dtype.is_floating else leaf for leaf in given]
            with storage.used(again=again) if storage else contextlib.nullcontext():
                result = function(*tf.nest.pack_sequence_as(arguments, full))
            kept[:] = [result]
            return [leaf for leaf in tf.nest.flatten(result) if leaf.dtype.is_floating]

        @tf.custom_gradient
        def lean(*floats: Array) -> Any:
            def backward(*upstream: Array) -> list[Array]:
                # In a loop, arguments are tensors of another graph, whose first use inside of an
                # operation with a gradient of its own is not recorded. Two may also be one tensor.
                here = [tf.identity(one) for one in floats]
                with tf.GradientTape() as tape:
                    tape.watch(here)
                    results = run(*here, again=True)
                with _known_orders():
                    return tape.gradient(results, here, output_gradients=upstream, unconnected_gradients="zero")

            return run(*floats), backward

        floats = lean(*(leaf for leaf in given if leaf.dtype.is_floating))
        result, results = kept[0], iter(floats)
        leaves = [next(results) if leaf.dtype.is_floating else leaf for leaf in tf.nest.flatten(result)]
        return tf.nest.pack_sequence_as(result, leaves)

    return call


def pullback(function: Callable[[Any], Mapping[str, Array]], arrays: Any) -> tuple[dict[str, Array], Callable[..., Any]]:
    """The values of a function, and its transposed Jacobian, which computes only what is asked for.

    Args:
        function: a function from a tree of arrays to arrays by name.
        arrays: where to take the Jacobian.

    Returns:
        The values, and a function of cotangents of some of them by name. It gives a tree like
        `arrays`. If `arrays` have names, too, it takes those wanted as a second argument. It may be
        called several times, even in branches, which do not recompute any part of the values.

    Example:

    >>> arrays = {"u": tf.constant(2.0), "v": tf.constant(3.0)}
    >>> values, pull = pullback(lambda x: {"product": x["u"] * x["v"], "first": x["u"]}, arrays)
    >>> {name: float(value) for name, value in pull({"product": tf.constant(1.0)}, ["v"]).items()}
    {'v': 2.0}
    """
    arrays = tf.nest.map_structure(tf.convert_to_tensor, arrays)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(arrays)
        values = dict(function(arrays))

    def pull(cotangents: Mapping[str, Array], names: Sequence[str] | None = None) -> Any:
        chosen = {name: values[name] for name in cotangents}
        wanted = arrays if names is None else {name: arrays[name] for name in names}
        return tape.gradient(chosen, wanted, output_gradients=dict(cotangents), unconnected_gradients="zero")

    return values, pull


def gradient_for_keras(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """As `gradient`, with the gradients that Keras's `fit` gives an optimizer: `None` for an array
    that is not used, and slices for a lookup."""
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        value, extra = function(arrays)
    return extra, tape.gradient(value, arrays)


def dense(gradient: Any) -> Array:
    """A gradient as an array; that of a lookup may be slices."""
    return tf.convert_to_tensor(gradient)
