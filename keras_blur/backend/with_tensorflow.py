"""The backend's functions on TensorFlow; see `keras_blur.backend`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.python.eager import record  # TensorFlow does not export whether a tape records

Array = Any


def vjp(function: Callable[..., Array], *inputs: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The value of a function, and its transposed Jacobian as a function of a cotangent.

    Args:
        function: of arrays, to one array.
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

    TensorFlow's own inverts their order when the program runs, and XLA must know it before. So the
    second derivative of a transposition would not compile.
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


def register(kind: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a tree of arrays for `tf.function` and `tf.nest`.

    Args:
        kind: the class.
        flatten: from an object to what is static and hashable, and a tuple of arrays.
        unflatten: the inverse of `flatten`.
    """
    kind.__tf_flatten__ = flatten  # type: ignore[attr-defined]
    kind.__tf_unflatten__ = classmethod(lambda _, static, arrays: unflatten(static, arrays))  # type: ignore[attr-defined]


def tanh(x: Array) -> Array:
    """The hyperbolic tangent in the type of x; that of `keras.ops` rounds float64 to float32 on
    JAX."""
    return tf.math.tanh(x)


def mean(x: Array, axis: Any, keepdims: bool = False) -> Array:
    """The mean in the type of x; that of `keras.ops` rounds float64 to float32 on JAX."""
    return ops.mean(x, axis=axis, keepdims=keepdims)


def replicas() -> int:
    """Number of replicas of the strategy in whose scope this is called; 1 where there is none."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica() -> Any:
    """Number of this replica, inside its program; 0 outside."""
    context = tf.distribute.get_replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def total(values: Sequence[Array]) -> list[Array]:
    """The sums over all replicas of a list of arrays, inside a replica's program."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1 or not values:
        return list(values)
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices; NaN for others, beside which no
    other is harmed.

    Args:
        matrix: `[..., n, n]`.
        right: `[..., n, m]`, with leading axes that broadcast.
    """
    return tf.linalg.cholesky_solve(tf.linalg.cholesky(matrix), right)


_KEY = 0x02461E293EC8F720  # with which TensorFlow mixes a seed into Philox's key and counter
_BLOCK = 4  # integers that Philox makes of one value of its counter


def bits(seed: Array, shape: tuple[Any, ...], dtype: str = "uint32") -> Array:
    """Uniform 32-bit integers of the Philox generator.

    Args:
        seed: two integers.
        shape: of the array.
        dtype: `"uint32"`, or `"int32"` for the same bits.
    """
    key, high = _mixed(seed)
    return _philox(shape, key, tf.concat([tf.constant([0], tf.uint64), high], 0), dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Rows `[rows, size]` of `bits(seed, [n, size])`.

    Args:
        seed: two integers.
        rows: indices `[rows]`.
        size: of a row.
    """
    key, high = _mixed(seed)

    def row(number: Array) -> Array:
        begin = tf.cast(number, tf.int64) * size
        drawn = _philox((size + _BLOCK,), key, tf.concat([tf.cast(begin // _BLOCK, tf.uint64)[None], high], 0), "uint32")
        return tf.slice(drawn, [begin % _BLOCK], [size])

    return tf.map_fn(row, tf.convert_to_tensor(rows), fn_output_signature=tf.TensorSpec((size,), tf.uint32))


def _philox(shape: tuple[Any, ...], key: Array, counter: Array, dtype: str) -> Array:
    """Integers of Philox, TensorFlow's algorithm 1: identical under TensorFlow's kernels, XLA and
    the TPU lowering, unlike its floating-point draws."""
    shape = tf.convert_to_tensor(shape, tf.int32)
    return tf.raw_ops.StatelessRandomUniformFullIntV2(shape=shape, key=key, counter=counter, dtype=tf.as_dtype(dtype), alg=1)


def _mixed(seed: Array) -> tuple[Array, Array]:
    """Philox's key `[1]` and the high half of its counter `[1]`, as in TensorFlow's own draws but
    in fewer operations."""
    mixed = _philox((_BLOCK,), tf.constant([_KEY], tf.uint64), tf.cast(seed, tf.uint64), "uint32")
    low, high = tf.unstack(tf.reshape(tf.cast(mixed, tf.uint64), (2, 2)), axis=1)
    return tf.split(tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, tf.constant(32, tf.uint64))), 2)


def upper_product(a: Array, b: int) -> Array:
    """The upper 32 of the 64 bits of products.

    Args:
        a: uint32 numbers.
        b: a number from 0 to `2**32 - 1`.
    """
    wide = tf.cast(a, tf.uint64) * tf.constant(b, tf.uint64)
    return tf.cast(tf.bitwise.right_shift(wide, tf.constant(32, tf.uint64)), tf.uint32)


def training_elsewhere() -> bool:
    """Whether a gradient tape records, as in the training step of an optimizer."""
    return record.could_possibly_record()


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """A replica's logs for the `fit` of Keras, whose mean over several workers needs an axis to run
    over."""
    if not _several_workers():
        return dict(logs)
    return {name: value[None] for name, value in logs.items()}


def _several_workers() -> bool:
    return isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


@contextlib.contextmanager
def symbolic_build(model: Any, iterator: Any, data_batch: Any) -> Iterator[tuple[Any, Any]]:
    """The surroundings in which Keras builds metrics, and the data that it may look at."""
    strategy = model.distribute_strategy
    with strategy.scope():
        if iterator is not None and _several_workers():
            batch = next(iter(next(iter(iterator))[2]))
            local = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], batch)
            yield None, local
        else:
            yield iterator, data_batch


def outside_of_programs() -> Any:
    """A scope in which variables are made outside of the program that is being traced."""
    return tf.init_scope()


def after(values: Sequence[Array]) -> Any:
    """A scope whose assignments wait for values."""
    return tf.control_dependencies([value for value in values if tf.is_tensor(value)])


def is_dataset(value: Any) -> bool:
    """Whether a value is a `tf.data.Dataset`."""
    return isinstance(value, tf.data.Dataset)


def constant(value: np.ndarray) -> Array:
    """An array on the CPU, where streams are drawn: a graph refers to it and holds no copy."""
    with tf.device("CPU"):
        return tf.constant(value)


def stream(
    draws: Sequence[Callable[[Array], Any]], which: Callable[[int], int] | None, start: int | tf.Variable, stride: int
) -> tf.data.Dataset:
    """An endless dataset of draws of the numbers `start`, `start + stride`, ... in order.

    Args:
        draws: functions from a number to a nest of arrays, all of the same shapes.
        which: the index of the function to call, for a number; `None` for the only one.
        start: the first number. The value of a variable is read when iteration starts.
        stride: step between numbers.
    """
    numbers = tf.data.Dataset.from_tensors(0).flat_map(
        lambda _: tf.data.Dataset.counter(start=tf.cast(tf.convert_to_tensor(start), tf.int64), step=stride)
    )

    def draw(number: Array) -> Any:
        if which is None:
            return draws[0](number)
        chosen = tf.numpy_function(lambda number: np.int32(which(int(number))), [number], tf.int32)
        branches = [functools.partial(one, number) for one in draws]
        return tf.switch_case(tf.ensure_shape(chosen, ()), branches)

    return numbers.map(draw, num_parallel_calls=1, deterministic=True).prefetch(4)
