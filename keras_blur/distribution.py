"""Several devices: the one file that names `tf.distribute`.

Whatever runs on several devices is written once, as a replica's program: it takes its share of the work, adds up with the
others what all need, and goes on with equal numbers, so that every replica writes the same values into its own copy of a
variable. Under no strategy a share is all the work and adding up changes nothing.

Work is dealt out like cards: of `n` pieces, replica `r` of `R` has those numbered `r`, `r + R`, `r + 2 R`, ... So what is
dealt does not depend on which replicas share a host, and results can be put back in order by one sum over replicas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

Array = Any


@dataclasses.dataclass(frozen=True)
class Shard:
    """A replica's part of the work.

    Attributes:
        index: number of the replica; an integer, or a scalar tensor.
        count: number of replicas.
    """

    index: Any = 0
    count: int = 1

    def part(self, values: Any, axis: int) -> Any:
        """This share of every array of a nest along an axis, whose size must be a multiple of `count`.

        Arrays without that axis are shared by all and come back as they are.

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
        """The inverse of `part`, inside a replica's program: all shares of every array, in order, on each replica."""
        if self.count == 1:
            return values
        leaves = tf.nest.flatten(values)
        wide = [value for value in leaves if value.shape.rank > axis]
        spread = []
        for value in wide:  # zeros but for the own share; chosen, not multiplied: what is not finite stays where it is
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
    """An array with the axis cut in two: pieces of a share, and shares."""
    size = value.shape[axis]
    if size % count:
        raise ValueError(f"An axis of {size} cannot be dealt to {count} replicas in equal shares.")
    return tf.reshape(value, (*value.shape[:axis], size // count, count, *value.shape[axis + 1 :]))


def replicas() -> int:
    """Number of replicas of the strategy in whose scope this is called, 1 where there is none."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def shard() -> Shard:
    """This replica's share, inside its program; all, outside."""
    context = tf.distribute.get_replica_context()
    if context is None:
        return ALL
    return Shard(context.replica_id_in_sync_group, context.num_replicas_in_sync)


def total(values: Sequence[Array]) -> list[Array]:
    """The sums over all replicas of a list of arrays, inside a replica's program; at no place inside a loop."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1 or not values:
        return list(values)
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def mean(values: Any) -> Any:
    """The means over all replicas of every array of a nest, inside a replica's program."""
    count = tf.distribute.get_replica_context().num_replicas_in_sync
    sums = total(tf.nest.flatten(values))
    return tf.nest.pack_sequence_as(values, [value / tf.cast(count, value.dtype) if count > 1 else value for value in sums])


def several_workers() -> bool:
    """Whether the strategy spans processes that add up by collectives."""
    return Runner().several_workers


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """A replica's logs for the `fit` of Keras, whose mean over several workers needs an axis to run over."""
    if not several_workers():
        return dict(logs)
    return {name: value[None] for name, value in logs.items()}


def local_batch(batch: Any) -> Any:
    """The part of a distributed batch that the first replica of this process has."""
    strategy = tf.distribute.get_strategy()
    return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], batch)


class Runner:
    """Runs programs on every replica of the strategy in whose scope it was made.

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
        """Whether the strategy spans processes that add up by collectives."""
        return isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)

    @property
    def compiles(self) -> bool:
        """Whether the strategy compiles what it runs: a TPU's does, and refuses functions that ask for it themselves."""
        return isinstance(self._strategy, tf.distribute.TPUStrategy)

    @property
    def writes_files(self) -> bool:
        """Whether this process is the one that writes what all would write alike."""
        resolver = self._strategy.cluster_resolver
        if resolver is None or not resolver.task_type:
            return True
        return resolver.task_type == "chief" or (resolver.task_type == "worker" and resolver.task_id == 0)

    def scope(self) -> Any:
        """The strategy's scope, for variables that are made later."""
        return self._strategy.scope()

    def run(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """The first local replica's results of a program that gives equal ones on all."""
        results = self._strategy.run(program, args=arguments)
        return tf.nest.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)

    def deal(self, dataset_of: Callable[[int, int], tf.data.Dataset]) -> Any:
        """An iterator over data of which each replica has its share.

        Args:
            dataset_of: takes a replica's index and the number of replicas. It returns the dataset of that replica,
                one element per step.
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
