"""Multi-device execution: the only module that uses `tf.distribute`.

Multi-device code is written once, as the program of one replica. Each replica processes its shard
of the work, reduces the intermediate results with the others, and continues with identical values.
All replicas therefore write the same values into their copies of a variable. Without a strategy,
the shard is the whole work and reductions are identities.

Work is interleaved: of `n` tasks, replica `r` of `R` takes tasks `r`, `r + R`, `r + 2 R`, ... The
assignment does not depend on how replicas are placed on hosts, and a single sum over replicas
restores the original order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

Array = Any


@dataclasses.dataclass(frozen=True)
class Shard:
    """One replica's part of the work.

    Attributes:
        index: index of the replica; an integer or a scalar tensor.
        count: number of replicas.
    """

    index: Any = 0
    count: int = 1

    def part(self, values: Any, axis: int) -> Any:
        """Selects this shard of every array in a nest along `axis`.

        The size of the axis must be a multiple of `count`. Arrays without that axis are returned
        unchanged.

        Example:

        >>> Shard(1, 2).part(tf.range(6), axis=0).numpy().tolist()
        [1, 3, 5]
        """

        def cut(value: Array) -> Array:
            if self.count == 1 or value.shape.rank <= axis:
                return value
            return tf.gather(_dealt(value, axis, self.count), self.index, axis=axis + 1)

        return tf.nest.map_structure(cut, values)

    def whole(self, values: Any, axis: int) -> Any:
        """Inverse of `part`: gathers all shards in order on every replica.

        Call it in a replica context.
        """
        if self.count == 1:
            return values
        leaves = tf.nest.flatten(values)
        wide = [value for value in leaves if value.shape.rank > axis]
        spread = []
        for value in wide:  # zero outside the own shard; selected, not multiplied, so NaN does not spread
            shape = [1] * (axis + 1) + [self.count] + [1] * (value.shape.rank - axis - 1)
            own = tf.reshape(tf.equal(tf.range(self.count), tf.cast(self.index, tf.int32)), shape)
            spread.append(tf.where(own, tf.expand_dims(value, axis + 1), tf.zeros((), value.dtype)))
        joined = iter(
            tf.reshape(both, (*value.shape[:axis], -1, *value.shape[axis + 1 :]))
            for both, value in zip(total(spread), wide, strict=True)
        )
        return tf.nest.pack_sequence_as(values, [next(joined) if leaf.shape.rank > axis else leaf for leaf in leaves])


ALL = Shard()


def _dealt(value: Array, axis: int, count: int) -> Array:
    """Splits an axis in two: position within a shard, and shard."""
    size = value.shape[axis]
    if size % count:
        raise ValueError(f"An axis of {size} cannot be split into equal shards for {count} replicas.")
    return tf.reshape(value, (*value.shape[:axis], size // count, count, *value.shape[axis + 1 :]))


def replicas() -> int:
    """Number of replicas of the current strategy; 1 without a strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def shard() -> Shard:
    """The shard of this replica in a replica context; `ALL` elsewhere."""
    context = tf.distribute.get_replica_context()
    if context is None:
        return ALL
    return Shard(context.replica_id_in_sync_group, context.num_replicas_in_sync)


def total(values: Sequence[Array]) -> list[Array]:
    """Sums a list of arrays over replicas. Call it in a replica context, never inside a loop."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1 or not values:
        return list(values)
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def mean(values: Any) -> Any:
    """Averages every array of a nest over replicas. Call it in a replica context."""
    count = tf.distribute.get_replica_context().num_replicas_in_sync
    sums = total(tf.nest.flatten(values))
    return tf.nest.pack_sequence_as(values, [value / tf.cast(count, value.dtype) if count > 1 else value for value in sums])


def several_workers() -> bool:
    """Whether the strategy spans several processes."""
    return Runner().several_workers


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """Adds an axis to logs for Keras's `fit`, which averages over it under several workers."""
    if not several_workers():
        return dict(logs)
    return {name: value[None] for name, value in logs.items()}


def local_batch(batch: Any) -> Any:
    """The part of a distributed batch on the first replica of this process."""
    strategy = tf.distribute.get_strategy()
    return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], batch)


class Runner:
    """Runs programs on every replica of the strategy that was current at construction.

    Example:

    >>> int(Runner().run(lambda x: shard().count * x, tf.constant(3)))
    3
    """

    def __init__(self) -> None:
        self._strategy = tf.distribute.get_strategy()

    @property
    def replicas(self) -> int:
        """Number of replicas."""
        return self._strategy.num_replicas_in_sync

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
