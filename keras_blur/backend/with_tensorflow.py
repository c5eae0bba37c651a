"""The backend's functions on TensorFlow; see `keras_blur.backend`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.python.eager import record  # TensorFlow does not export whether a tape is recording

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


def register(kind: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a tree of arrays for `tf.function` and `tf.nest`.

    Args:
        kind: the class.
        flatten: maps an object to its static, hashable part and a tuple of arrays.
        unflatten: the inverse of `flatten`.
    """
    kind.__tf_flatten__ = flatten  # type: ignore[attr-defined]
    kind.__tf_unflatten__ = classmethod(lambda _, static, arrays: unflatten(static, arrays))  # type: ignore[attr-defined]


def value_of(variable: Any) -> Array:
    """The value of a Keras variable as an array of the program that reads it."""
    return tf.convert_to_tensor(variable.value)


def numbers_of(variable: Any) -> np.ndarray:
    """The value of a Keras variable, outside of programs."""
    return np.asarray(variable.numpy())


def leaves(tree: Any) -> list[Array]:
    """The arrays of a tree in order."""
    return tf.nest.flatten(tree)


def pack(like: Any, arrays: Sequence[Array]) -> Any:
    """A tree of the structure of another, with these arrays; the inverse of `leaves`."""
    return tf.nest.pack_sequence_as(like, arrays)


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """A tree of the values of a function of the arrays of trees."""
    return tf.nest.map_structure(function, *trees)


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


def loop(count: int, body: Callable[..., tuple[Any, ...]], *carried: Any) -> tuple[Any, ...]:
    """Carries trees of arrays through a fixed number of steps, with a gradient.

    It is one loop of the program, whose compile time does not depend on the count.

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


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays that stores nothing for its gradient but its arguments.

    The backward pass computes the function again.

    Args:
        function: a function from trees of arrays to a tree of arrays. It must not capture arrays
            that need a gradient.
    """

    def call(*arguments: Any) -> Any:
        given = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(arguments)]
        kept: list[Any] = []  # the tree of results, with all that is not floating-point

        # Only floating-point tensors have a gradient. The others are captured, and left in `kept`,
        # as a cast to a float would round large integers.
        def run(*floats: Array) -> list[Array]:
            again = iter(floats)
            full = [next(again) if leaf.dtype.is_floating else leaf for leaf in given]
            result = function(*tf.nest.pack_sequence_as(arguments, full))
            kept[:] = [result]
            return [leaf for leaf in tf.nest.flatten(result) if leaf.dtype.is_floating]

        @tf.custom_gradient
        def stored(*floats: Array) -> Any:
            def backward(*upstream: Array) -> list[Array]:
                with tf.GradientTape() as tape:
                    tape.watch(floats)
                    results = run(*floats)
                return tape.gradient(results, floats, output_gradients=upstream, unconnected_gradients="zero")

            return run(*floats), backward

        floats = stored(*(leaf for leaf in given if leaf.dtype.is_floating))
        result, results = kept[0], iter(floats)
        leaves = [next(results) if leaf.dtype.is_floating else leaf for leaf in tf.nest.flatten(result)]
        return tf.nest.pack_sequence_as(result, leaves)

    return call


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
            traced[key] = wrapped.get_concrete_function(*arguments)
        return traced[key](*arguments)

    return call


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices in the precision of their type, as far as TensorFlow's own setting
    allows (`tf.config.experimental.enable_tensor_float_32_execution`)."""
    return tf.matmul(a, b)


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


def on_platform(arrays: Any, *, cpu: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Returns `cpu(arrays)` on a CPU and `other(arrays)` on any other device.

    Both functions must give the same values.

    Example:

    >>> bool(on_platform(tf.constant(2.0), cpu=lambda x: x + x, other=lambda x: 2.0 * x) == 4.0)
    True
    """
    elsewhere = tf.config.list_logical_devices("GPU") or isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)
    return (other if elsewhere else cpu)(arrays)


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[Any]:
    """A context with the scope in which trainers use a number of devices of one kind.

    On a CPU the devices are virtual: each takes a share of the work, and they share the cores.

    Args:
        count: number of devices.

    Raises:
        ValueError: if there are fewer, or the CPU was already in use as fewer devices.
    """
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU":
        with contextlib.suppress(RuntimeError):  # too late: the CPU is in use
            virtual = [tf.config.LogicalDeviceConfiguration()] * count
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], virtual)
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(found) < count:
        raise ValueError(f"`devices` must be at most the {len(found)} that there are. Received: devices={count}")
    yield tf.distribute.MirroredStrategy(found[:count]).scope()


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


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """An optimizer's step.

    Args:
        optimizer: any Keras optimizer, which was built for the variables.
        gradients: gradients, scaled as the optimizer's own; `None` for a variable that is not used.
        variables: Keras variables in the optimizer's order.
    """
    optimizer.apply(list(gradients), list(variables))


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


def tanh(x: Array) -> Array:
    """The hyperbolic tangent in the type of x; that of `keras.ops` rounds float64 to float32 on
    JAX."""
    return tf.math.tanh(x)


def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """The mean in the type of x; that of `keras.ops` rounds float64 to float32 on JAX."""
    return ops.mean(x, axis=axis, keepdims=keepdims)


def replicas() -> int:
    """Number of replicas of the strategy in whose scope this is called; 1 where there is none."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica() -> Any:
    """Number of this replica, inside its program; 0 outside."""
    context = tf.distribute.get_replica_context()
    return 0 if context is None else context.replica_id_in_sync_group


def replicas_of_program() -> int:
    """Number of replicas that run this program; 1 outside of one."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def total(values: Sequence[Array]) -> list[Array]:
    """The sums over all replicas of a list of arrays, inside a replica's program, never inside a
    loop of it."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1 or not values:
        return list(values)
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices; NaN for others, which do not
    affect the matrices beside them.

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
        shape: shape of the array.
        dtype: `"uint32"`, or `"int32"` for the same bits.
    """
    key, high = _mixed(seed)
    return _philox(shape, key, tf.concat([tf.constant([0], tf.uint64), high], 0), dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Rows `[rows, size]` of `bits(seed, [n, size])`.

    Args:
        seed: two integers.
        rows: indices `[rows]`.
        size: size of a row.
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
    """Whether a gradient tape is recording, as in the training step of an optimizer."""
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


def on_cpu() -> Any:
    """A scope whose arrays are on the CPU."""
    return tf.device("CPU")


def constant(value: np.ndarray) -> Array:
    """An array on the CPU, where streams are drawn: a graph refers to it and holds no copy."""
    with tf.init_scope(), on_cpu():
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

    draw = tf.autograph.experimental.do_not_convert(draw)  # AutoGraph would bury what an error says
    return _untuned(numbers.map(draw, num_parallel_calls=1, deterministic=True).prefetch(4))


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset without autotuning, which has nothing to tune here. Its thread sleeps for up to a
    minute, and whoever deletes an iterator may have to wait for it."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def passes(arrays: Sequence[np.ndarray], rows: Callable[[Array], Array], first: int, skipped: int) -> tf.data.Dataset:
    """An endless iterable of batches of arrays.

    Args:
        arrays: `[n, ...]`.
        rows: maps the number of a pass, an int32 array, to the indices of its batches,
            `[batches, batch]`.
        first: number of the first pass.
        skipped: number of its batches to leave out.
    """
    held = [tf.constant(array) for array in arrays]
    numbers = tf.data.Dataset.range(first, np.iinfo(np.int32).max)
    chosen = numbers.flat_map(lambda number: tf.data.Dataset.from_tensor_slices(rows(number)))
    return _untuned(chosen.skip(skipped).map(lambda row: tuple(tf.gather(array, row) for array in held)).prefetch(2))


def repeated(data: Any, skipped: int, index: int, count: int) -> tf.data.Dataset:
    """An endless iterable of the batches of passes over data.

    Args:
        data: a `tf.data.Dataset`, or an iterable of numpy batches with an `element_spec`: shapes
            and dtypes of the parts of a batch.
        skipped: number of batches to leave out.
        index, count: which examples of each batch: `index`, `index + count`, ...
    """
    dataset = data
    if not isinstance(data, tf.data.Dataset):
        spec = tuple(tf.TensorSpec(one.shape, one.dtype) for one in data.element_spec)
        dataset = _untuned(tf.data.Dataset.from_generator(lambda: iter(data), output_signature=spec))
    return dataset.repeat().skip(skipped).map(lambda *batch: tuple(part[index::count] for part in batch)).prefetch(2)


class Runner:
    """Runs programs on every replica of the strategy that was current at construction.

    Example:

    >>> int(Runner().run(lambda x: replicas() * x, tf.constant(3)))
    3
    """

    in_blocks = False  # a replica's places in what is dealt are not consecutive
    splits_members = False

    def __init__(self) -> None:
        self._strategy = tf.distribute.get_strategy()

    @property
    def replicas(self) -> int:
        """Number of replicas."""
        return self._strategy.num_replicas_in_sync

    @property
    def shares(self) -> int:
        """Number of devices that share what is dealt."""
        return self.replicas

    @property
    def several_workers(self) -> bool:
        """Whether the strategy spans several processes."""
        return isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)

    @property
    def compiles(self) -> bool:
        """Whether the strategy compiles programs itself, as `TPUStrategy` does.

        Such a strategy rejects functions with their own `jit_compile`.
        """
        return isinstance(self._strategy, tf.distribute.TPUStrategy)

    @property
    def writes_files(self) -> bool:
        """Whether this process writes files. Exactly one process does."""
        resolver = self._strategy.cluster_resolver
        if resolver is None or not resolver.task_type:
            return True
        return resolver.task_type == "chief" or (resolver.task_type == "worker" and resolver.task_id == 0)

    def scope(self) -> Any:
        """The strategy's scope, for creating variables later."""
        return self._strategy.scope()

    def run(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a program on all replicas and returns the results of the first local one.

        The results must be equal on all replicas.
        """
        results = self._strategy.run(program, args=arguments)
        return tf.nest.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)

    def program(self, function: Callable[..., Any], variables: Callable[[], Sequence[Any]], eager: bool = False) -> Any:
        """A program of all replicas that may read and assign variables.

        Args:
            function: a function from trees of arrays to a tree of arrays, the program of one
                replica. Results must be equal on all replicas.
            variables: returns the Keras variables that the function reads or assigns.
            eager: whether to run it without compilation, for debugging.
        """
        del variables  # a graph refers to them by itself

        def run(*arguments: Any) -> Any:
            return self.run(function, *arguments)

        return run if eager else tf.function(run, autograph=False)

    def each(self, function: Callable[..., Any], common: Any, dealt: Any) -> Any:
        """The value of a function of trees of arrays: a replica holds its part already."""
        return function(common, dealt)

    def undivided(self) -> Any:
        """No scope: Keras divides batches of any size."""
        return contextlib.nullcontext()

    def split(self, function: Callable[..., Any], common: Any, outer: Any, tasks: Any, kept: Any) -> tuple[Any, Any]:
        """The results of a function of this replica's tasks and all members, inside its program.

        Args:
            function: takes the part of the tasks, the part of the members (each an index and the
                number of parts) and the four trees.
            common, outer, tasks, kept: trees of arrays, those of this replica.
        """
        count, first = replicas_of_program(), tf.constant(0, tf.int32)
        index = tf.convert_to_tensor(replica(), tf.int32) if count > 1 else first
        return function((index, count), (first, 1), common, outer, tasks, kept)

    def deal(self, dataset_of: Callable[[int, int], tf.data.Dataset]) -> Any:
        """Returns an iterator in which each replica has its own dataset.

        Args:
            dataset_of: takes a replica's index and the number of replicas. It returns the dataset
                of that replica, one element per step.
        """

        def of_pipeline(context: tf.distribute.InputContext) -> tf.data.Dataset:
            count = context.num_replicas_in_sync
            local = count // context.num_input_pipelines
            first = context.input_pipeline_id * local
            shards = [dataset_of(first + number, count) for number in range(local)]
            if local == 1:
                return shards[0]
            return tf.data.Dataset.choose_from_datasets(shards, tf.data.Dataset.range(local).repeat())

        return iter(self._strategy.distribute_datasets_from_function(of_pipeline))
