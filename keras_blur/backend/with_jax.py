"""The backend's functions on JAX; see `keras_blur.backend`.

To a program, a batch that `keras.distribution` spreads over several devices is one array, and the
compiler inserts the sums. Only `Runner.split` computes one itself.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Array = Any


def vjp(function: Callable[..., Array], *inputs: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """The value of a function, and its transposed Jacobian as a function of a cotangent."""
    return jax.vjp(function, *inputs)


def jvp(function: Callable[..., Array], inputs: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    """The value of a function, and its Jacobian times a tangent."""
    return jax.jvp(function, tuple(inputs), tuple(tangents))


def register(kind: type, flatten: Callable[[Any], tuple[Any, Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a tree of arrays for `jit`, `grad` and `vmap`."""

    def swapped(value: Any) -> tuple[Any, Any]:
        static, arrays = flatten(value)
        return arrays, static

    jax.tree_util.register_pytree_node(kind, swapped, unflatten)


def value_of(variable: Any) -> Array:
    """The value of a Keras variable."""
    return variable.value


def numbers_of(variable: Any) -> np.ndarray:
    """The value of a Keras variable, outside of programs; its own `numpy` warns under NumPy 2."""
    return np.array(variable.value)


def leaves(tree: Any) -> list[Array]:
    """The arrays of a tree in order."""
    return jax.tree.leaves(tree)


def pack(like: Any, arrays: Sequence[Array]) -> Any:
    """A tree of the structure of another, with these arrays; the inverse of `leaves`."""
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """A tree of the values of a function of the arrays of trees."""
    return jax.tree.map(function, *trees)


def gradient(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """The second result of a function, and the gradient of its first, a scalar."""
    found, extra = jax.grad(function, has_aux=True)(arrays)
    return extra, found


def loop(count: int, body: Callable[..., tuple[Any, ...]], *carried: Any) -> tuple[Any, ...]:
    """Carries trees of arrays through a fixed number of steps, with a gradient."""
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda carried, number: (tuple(body(number, *carried)), None), tuple(carried), numbers)[0]


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays that stores nothing for its gradient but its arguments."""
    return jax.checkpoint(function)


def compiled(function: Callable[..., Any], *, jit_compile: bool = True) -> Callable[..., Any]:
    """Compiles a function of trees of arrays; there are no programs on JAX that XLA does not
    compile."""
    del jit_compile
    return jax.jit(function)


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices in the precision of their type; that of `keras.ops` rounds float32 to
    bfloat16 on a TPU, and to 10 bits on a GPU."""
    return jnp.matmul(a, b, precision="highest")


def one_by_one(function: Callable[..., Any], arrays: Any, like: Any) -> Any:
    """The values of a function of a tree at each place of the first axis of its arrays."""
    del like
    return jax.lax.map(function, arrays)


def on_platform(arrays: Any, *, cpu: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Returns `cpu(arrays)` on a CPU and `other(arrays)` on any other device.

    Both functions must give the same values.
    """
    return jax.lax.platform_dependent(arrays, cpu=cpu, default=other)


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[Any]:
    """A context with the scope in which trainers use a number of devices; on a CPU, virtual
    ones."""
    with contextlib.suppress(RuntimeError):  # too late: the CPU is in use
        jax.config.update("jax_num_cpu_devices", count)
    found = keras.distribution.list_devices()
    if len(found) < count:
        raise ValueError(f"`devices` must be at most the {len(found)} that there are. Received: devices={count}")
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=found[:count]))
    try:
        yield contextlib.nullcontext()
    finally:
        keras.distribution.set_distribution(before)


def pullback(function: Callable[[Any], Mapping[str, Array]], arrays: Any) -> tuple[dict[str, Array], Callable[..., Any]]:
    """The values of a function, and its transposed Jacobian, which computes only what is asked
    for."""
    values, tangents = jax.linearize(lambda arrays: dict(function(arrays)), arrays)

    def pull(cotangents: Mapping[str, Array], names: Sequence[str] | None = None) -> Any:
        def chosen(arrays: Any) -> dict[str, Array]:  # `jax.vjp` would carry zeros of the others through
            found = tangents(arrays)
            return {name: found[name] for name in cotangents}

        (found,) = jax.linear_transpose(chosen, arrays)(dict(cotangents))
        return found if names is None else {name: found[name] for name in names}  # the compiler drops the others

    return values, pull


def gradient_for_keras(function: Callable[[Any], tuple[Array, Any]], arrays: Any) -> tuple[Any, Any]:
    """`gradient`: Keras's `fit` gives an optimizer the same on JAX."""
    return gradient(function, arrays)


def dense(gradient: Any) -> Array:
    """The gradient itself."""
    return gradient


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """An optimizer's step; `apply` of one that scales losses assigns in a branch, which no program
    may."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(list(gradients), list(variables))
        return
    touched = [*variables, *optimizer.variables]
    before = [one.value for one in touched]
    own, state = optimizer.stateless_apply(before[len(variables) :], list(gradients), before[: len(variables)])
    for variable, value in zip(touched, [*own, *state], strict=True):
        variable.assign(value)


def branch(index: Array, functions: Sequence[Callable[[], Any]]) -> Any:
    """The result of one of several functions of no arguments; the others are not computed."""
    return jax.lax.switch(index, list(functions))


def tanh(x: Array) -> Array:
    """The hyperbolic tangent in the type of x; that of `keras.ops` rounds float64 to float32 on
    JAX."""
    return jnp.tanh(x)


def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """The mean in the type of x; that of `keras.ops` rounds float64 to float32 on JAX."""
    return jnp.mean(x, axis=axis if axis is None or isinstance(axis, int) else tuple(axis), keepdims=keepdims)


def solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices; NaN for others, which do not
    affect the matrices beside them.

    On a CPU, matrices are solved one at a time. Programs that solved several batches of matrices
    side by side hung (JAX 0.10, two cores).
    """
    lead = jnp.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])

    def together(matrix: Array, right: Array) -> Array:
        sound = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
        factor = jnp.where(sound, jax.lax.linalg.cholesky(matrix, symmetrize_input=False), jnp.nan)
        return jax.scipy.linalg.cho_solve((factor, True), right)

    def in_turn(matrix: Array, right: Array) -> Array:
        flat = tuple(jnp.reshape(one, (-1, *one.shape[-2:])) for one in (matrix, right))
        return jnp.reshape(jax.lax.map(lambda pair: together(*pair), flat), right.shape)

    matrix, right = (jnp.broadcast_to(one, (*lead, *one.shape[-2:])) for one in (matrix, right))
    if math.prod(lead) == 1:
        return together(matrix, right)
    return jax.lax.platform_dependent(matrix, right, cpu=in_turn, default=together)


def replicas() -> int:
    """Always 1: a batch on several devices is one array."""
    return 1


def replica() -> int:
    """Always 0."""
    return 0


def replicas_of_program() -> int:
    """Always 1."""
    return 1


def total(values: Sequence[Array]) -> list[Array]:
    """The values themselves."""
    return list(values)


def training_elsewhere() -> bool:
    """Always `False`: JAX does not tell a function whether its gradient will be taken."""
    return False


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """The logs themselves."""
    return dict(logs)


@contextlib.contextmanager
def symbolic_build(model: Any, iterator: Any, data_batch: Any) -> Iterator[tuple[Any, Any]]:
    """Nothing to prepare."""
    yield iterator, data_batch


def outside_of_programs() -> Any:
    """No scope is needed."""
    return contextlib.nullcontext()


def after(values: Sequence[Array]) -> Any:
    """No scope: a program is a function of its inputs."""
    return contextlib.nullcontext()


def is_dataset(value: Any) -> bool:
    """Whether a value is a `tf.data.Dataset`, which JAX's trainer takes where TensorFlow is
    installed."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(value, tensorflow.data.Dataset)


# Philox 4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011), with the key
# and counter that TensorFlow's stateless generators make of a seed, so both backends draw the same
# integers.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SCRAMBLE = (0x3EC8F720, 0x02461E29)
_ROUNDS = 10
_BLOCK = 4  # integers that Philox makes of one value of its counter


def _multiply(a: Array, b: int) -> tuple[Array, Array]:
    """Upper and lower 32 bits of a product, from 16-bit halves: JAX has no 64-bit integers by
    default."""
    mask = jnp.uint32(0xFFFF)
    low, high = a & mask, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    middle = high * b_low + ((low * b_low) >> 16)
    cross = low * b_high + (middle & mask)
    return high * b_high + (middle >> 16) + (cross >> 16), a * jnp.uint32(b)


@jax.jit  # outside of a program, a loop would be traced at each call
def philox(counter: Sequence[Array], key: Sequence[Array]) -> tuple[Array, ...]:
    """Four random 32-bit integers for each value of a counter of four integers.

    Example:

    >>> [hex(int(x)) for x in philox([jnp.uint32(0)] * 4, [jnp.uint32(0)] * 2)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """

    def one(_: Any, state: Any) -> Any:
        (a, b, c, d), (first, second) = state
        high, low = _multiply(a, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c, _MULTIPLIERS[1])
        mixed = (high_2 ^ b ^ first, low_2, high ^ d ^ second, low)
        return mixed, (first + jnp.uint32(_WEYL[0]), second + jnp.uint32(_WEYL[1]))

    # A loop, as XLA computes the rounds of a straight program again and again where it fuses them.
    return jax.lax.fori_loop(0, _ROUNDS, one, (tuple(counter), tuple(key)))[0]


def _words(value: Array) -> tuple[Array, Array]:
    """A signed 32-bit integer as the lower and upper word of a 64-bit one."""
    value = jnp.asarray(value).astype(jnp.int32)
    return value.astype(jnp.uint32), (value >> 31).astype(jnp.uint32)


def _blocks(seed: Array, numbers: Array) -> Array:
    """The blocks of these numbers of a seed's integers: `[*numbers.shape, 4]`."""
    low, high = _words(seed[0])
    low_2, high_2 = _words(seed[1])
    mixed = philox((low, high, low_2, high_2), tuple(jnp.uint32(word) for word in _SCRAMBLE))
    zeros = jnp.zeros_like(numbers)
    return jnp.stack(philox((numbers, zeros, mixed[2] + zeros, mixed[3] + zeros), (mixed[0], mixed[1])), axis=-1)


def bits(seed: Array, shape: tuple[int, ...], dtype: str = "uint32") -> Array:
    """Uniform 32-bit integers of the Philox generator.

    Args:
        seed: two integers.
        shape: shape of the array.
        dtype: `"uint32"`, or `"int32"` for the same bits.
    """
    size = int(np.prod(shape, dtype=np.int64))
    drawn = _blocks(seed, jnp.arange(-(-size // _BLOCK), dtype=jnp.uint32))
    return drawn.reshape(-1)[:size].reshape(shape).astype(dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Rows `[rows, size]` of `bits(seed, [n, size])`.

    Args:
        seed: two integers.
        rows: indices `[rows]`.
        size: size of a row.
    """
    begin = jnp.asarray(rows).astype(jnp.uint32)[:, None] * jnp.uint32(size)
    numbers = begin // _BLOCK + jnp.arange(-(-size // _BLOCK) + 1, dtype=jnp.uint32)
    drawn = _blocks(seed, numbers).reshape(begin.shape[0], -1)
    return jnp.take_along_axis(drawn, begin % _BLOCK + jnp.arange(size, dtype=jnp.uint32), axis=1)


def upper_product(a: Array, b: int) -> Array:
    """The upper 32 of the 64 bits of products.

    Args:
        a: uint32 numbers.
        b: a number from 0 to `2**32 - 1`.
    """
    return _multiply(a, b)[0]


def constant(value: np.ndarray) -> np.ndarray:
    """The array itself."""
    return value


class stream:
    """An endless iterable of draws of the numbers `start`, `start + stride`, ... as numpy arrays.

    They are drawn on the CPU, one program for each function.

    Args:
        draws: functions from a number to a tree of arrays.
        which: the index of the function to call, for a number; `None` for the only one.
        start: the first number. The value of a variable is read when iteration starts.
        stride: step between numbers.
    """

    def __init__(self, draws: Sequence[Callable[[Array], Any]], which: Callable[[int], int] | None, start: Any, stride: int):
        self._draws, self._which, self._start, self._stride = [jax.jit(one) for one in draws], which, start, stride
        self._size: int | None = None
        for draw in self._draws:  # what cannot be drawn raises now
            with on_cpu():
                draw.eval_shape(np.int32(0))

    def batch(self, size: int, drop_remainder: bool = True) -> stream:
        """The same stream, with `size` consecutive draws along a new first axis of each array."""
        del drop_remainder  # it has no end
        made = copy.copy(self)
        made._size = size
        return made

    def __iter__(self) -> Iterator[Any]:
        numbers = itertools.count(int(self._start), self._stride)
        if self._size is None:
            yield from map(self._drawn, numbers)
        while self._size:
            several = [self._drawn(next(numbers)) for _ in range(self._size)]
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *several)

    def _drawn(self, number: int) -> Any:
        draw = self._draws[self._which(number) if self._which else 0]
        with on_cpu():
            return jax.tree.map(np.asarray, draw(np.int32(number)))


def on_cpu() -> Any:
    """A scope whose arrays are on this process's CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


class passes:
    """An endless iterable of batches of arrays; their indices are drawn on the CPU."""

    def __init__(self, arrays: Sequence[np.ndarray], rows: Callable[[Array], Array], first: int, skipped: int):
        self._arrays, self._rows, self._first, self._skipped = arrays, jax.jit(rows), first, skipped

    def __iter__(self) -> Iterator[Any]:
        skipped = self._skipped
        for number in itertools.count(self._first):
            with on_cpu():
                chosen = np.asarray(self._rows(np.int32(number)))
            for row in chosen[skipped:]:
                yield tuple(array[row] for array in self._arrays)
            skipped = 0


class repeated:
    """An endless iterable of the batches of passes over data."""

    def __init__(self, data: Any, skipped: int, index: int, count: int):
        del index, count  # there is one replica
        self._data, self._skipped = data, skipped

    def __iter__(self) -> Iterator[Any]:
        seen, before = 0, -1
        while seen > before:  # a pass without batches ends it
            before = seen
            for seen, batch in enumerate(self._data, before + 1):
                if seen > self._skipped:
                    yield tuple(np.asarray(part) for part in batch)


class Program:
    """A compiled function that reads and assigns Keras variables; see `Runner.program`."""

    def __init__(self, function: Callable[..., Any], variables: Sequence[Any], whole: NamedSharding | None):
        self._variables = list({id(one): one for one in variables}.values())
        self._whole = whole

        def pure(values: Sequence[Array], *arguments: Any) -> tuple[Any, list[Array]]:
            with keras.StatelessScope(list(zip(self._variables, values, strict=True))) as scope:
                result = function(*arguments)
                after = [scope.get_current_value(one) for one in self._variables]
            return result, [old if new is None else new for old, new in zip(values, after, strict=True)]

        self._compiled = jax.jit(pure, out_shardings=whole)

    def __call__(self, *arguments: Any) -> Any:
        result, after = self._compiled([one.value for one in self._variables], *arguments)
        for variable, value in zip(self._variables, after, strict=True):
            variable.assign(value)
        return result

    def lower(self, *arguments: Any) -> Any:
        """The program before it is compiled, a `jax.stages.Lowered`.

        Args:
            *arguments: trees of arrays or of `jax.ShapeDtypeStruct`.
        """
        values = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._whole) for one in self._variables]
        return self._compiled.lower(values, *arguments)


class Runner:
    """Runs programs on the devices of `keras.distribution`'s layout that was current at
    construction.

    A program sees the arrays of all devices, so there is one replica. Under
    `keras.distribution.DataParallel`, what is dealt is laid over the devices along its first axis,
    and the compiler splits the work accordingly and inserts the sums.
    """

    replicas = 1
    compiles = True  # whole programs: a function in one needs no compilation of its own
    in_blocks = True  # a device's places in what is dealt are consecutive
    splits_members = True  # where the devices do not divide the tasks

    def __init__(self) -> None:
        layout = keras.distribution.distribution()
        self._mesh: Any = None
        self._axis = ""
        if isinstance(layout, keras.distribution.DataParallel):
            self._mesh, self._axis = layout.device_mesh.backend_mesh, layout.batch_dim_name

    @property
    def shares(self) -> int:
        """Number of devices that what is dealt is laid over."""
        return 1 if self._mesh is None else int(self._mesh.shape[self._axis])

    @property
    def several_workers(self) -> bool:
        """Whether the devices belong to several processes."""
        return jax.process_count() > 1

    @property
    def writes_files(self) -> bool:
        """Whether this process writes files. Exactly one process does."""
        return jax.process_index() == 0

    def scope(self) -> Any:
        """Nothing to enter: variables are laid out as `keras.distribution` says."""
        return contextlib.nullcontext()

    def run(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a program."""
        return program(*arguments)

    def program(self, function: Callable[..., Any], variables: Callable[[], Sequence[Any]], eager: bool = False) -> Any:
        """A compiled program that may read and assign Keras variables.

        Args:
            function: a function from trees of arrays to a tree of arrays.
            variables: returns the Keras variables that the function reads or assigns.
            eager: whether to run it without compilation, for debugging.
        """
        return function if eager else Program(function, variables(), None if self._mesh is None else self._laid_out(False))

    def _laid_out(self, split: bool) -> NamedSharding:
        """The layout of arrays whose first axis is laid over the devices, or that are whole on
        each."""
        return NamedSharding(self._mesh, PartitionSpec(self._axis) if split else PartitionSpec())

    def on(self, mesh: Any, axis: str) -> None:
        """Takes other devices, which need not be in this machine: programs can then be lowered and
        compiled for them, but not run.

        Args:
            mesh: a `jax.sharding.Mesh`.
            axis: its axis over which work is split.
        """
        self._mesh, self._axis = mesh, axis

    def shape_of(self, array: np.ndarray) -> jax.ShapeDtypeStruct:
        """What stands for an array that would be dealt, where a program is lowered."""
        split = bool(array.ndim) and not array.shape[0] % self.shares
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._laid_out(split))

    def each(self, function: Callable[..., Any], common: Any, dealt: Any) -> Any:
        """The value of a function of trees of arrays, each device computing its part, inside a
        program.

        The compiler alone would not split a loop over places of the first axis.

        Args:
            function: takes two trees, and returns a tree of arrays whose first axis is that of
                `dealt`. No place of that axis may depend on another.
            common: a tree of arrays that are whole in every part.
            dealt: a tree of arrays that are split along their first axis. If the devices do not
                divide it, every device computes all of it.
        """
        if self.shares == 1 or any(leaf.shape[0] % self.shares for leaf in leaves(dealt)):
            return function(common, dealt)
        along = PartitionSpec(self._axis)
        split = jax.shard_map(
            function, mesh=self._mesh, in_specs=(PartitionSpec(), along), out_specs=along,
            check_vma=False,  # as in `split`
        )  # fmt: skip
        return split(common, dealt)

    def split(self, function: Callable[..., Any], common: Any, outer: Any, tasks: Any, kept: Any) -> tuple[Any, Any]:
        """A function of tasks and members, each device computing a part, inside a program.

        Tasks are split if the devices divide their number, else members, else nothing. The compiler
        alone would not split a loop over either.

        Args:
            function: takes the part of the tasks, the part of the members (each an index and the
                number of parts) and the four trees. It returns a tree of arrays
                `[members, ...]`, of which this gives the mean over parts of the tasks, and a tree
                like `kept`.
            common: a tree of arrays that are whole in every part.
            outer: a tree of arrays `[members, ...]`.
            tasks: a tree of arrays `[tasks, ...]`.
            kept: a tree of arrays `[members, tasks, ...]`. Those with fewer axes are whole.
        """
        shares, axis, all_of_them = self.shares, self._axis, (jnp.int32(0), 1)
        by_task, by_member = (not any(leaf.shape[0] % shares for leaf in leaves(tree)) for tree in (tasks, outer))
        if shares == 1 or not (by_task or by_member):
            return function(all_of_them, all_of_them, common, outer, tasks, kept)
        whole, along = PartitionSpec(), PartitionSpec(axis)
        of_members, of_tasks = (whole, along) if by_task else (along, whole)
        pair = PartitionSpec(None, axis) if by_task else along
        of_kept = tree_map(lambda leaf: pair if len(leaf.shape) > 1 else whole, kept)

        def part(*trees: Any) -> tuple[Any, Any]:
            own = (jax.lax.axis_index(axis), shares)
            if not by_task:
                return function(all_of_them, own, *trees)
            found, after = function(own, all_of_them, *trees)
            return jax.lax.pmean(found, axis), after

        split = jax.shard_map(
            part, mesh=self._mesh, in_specs=(whole, of_members, of_tasks, of_kept), out_specs=(of_members, of_kept),
            check_vma=False,  # a loop would have to say which of its zeros differ between devices
        )  # fmt: skip
        return split(common, outer, tasks, kept)

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """A scope in which Keras gives all devices whole batches, of any size and from any source.

        Keras itself refuses batches that the devices do not divide, and arrays in several
        processes.
        """
        layout = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(layout)

    def deal(self, dataset_of: Callable[[int, int], Any]) -> Iterator[Any]:
        """An iterator of the elements of a stream, each laid over the devices.

        Every process draws all of them, and keeps what its own devices need.

        Args:
            dataset_of: takes 0 and 1; it returns an iterable of trees of arrays, one per step.
        """
        return (jax.tree.map(self._laid, element) for element in dataset_of(0, 1))

    def _laid(self, array: np.ndarray) -> Array:
        if self._mesh is None:
            return jax.device_put(array)  # now, as it may serve several steps
        layout = self._laid_out(bool(array.ndim) and not array.shape[0] % self.shares)
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])
