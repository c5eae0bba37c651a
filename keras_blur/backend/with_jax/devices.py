"""Several devices on JAX: `jax.sharding`.

To a program, a batch that `keras.distribution` spreads over several devices is one array, and the
compiler inserts the sums. Only `Runner.split` computes one itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from keras_blur.backend.with_jax.trees import leaves, tree_map

Array = Any


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


def on_platform(arrays: Any, *, cpu: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Returns `cpu(arrays)` on a CPU and `other(arrays)` on any other device.

    Both functions must give the same values.
    """
    return jax.lax.platform_dependent(arrays, cpu=cpu, default=other)


def by_operation() -> bool:
    """Always `False`: XLA compiles all programs."""
    return False


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
