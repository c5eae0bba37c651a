"""Several devices on TensorFlow: `tf.distribute`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_blur.backend.with_tensorflow.programs import by_xla, forgetting_gradients

Array = Any


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


def on_platform(arrays: Any, *, cpu: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Returns `cpu(arrays)` on a CPU and `other(arrays)` on any other device.

    Both functions must give the same values.

    Example:

    >>> bool(on_platform(tf.constant(2.0), cpu=lambda x: x + x, other=lambda x: 2.0 * x) == 4.0)
    True
    """
    elsewhere = tf.config.list_logical_devices("GPU") or isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)
    return (other if elsewhere else cpu)(arrays)


def by_operation() -> bool:
    """Whether what is traced now runs operation by operation, each by a kernel of its own: in a
    plain graph or eagerly, and not as part of a program of `compiled` that XLA compiles, nor on a
    TPU."""
    return not by_xla() and not isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


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


def _several_workers() -> bool:
    return isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


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
            with forgetting_gradients():
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
