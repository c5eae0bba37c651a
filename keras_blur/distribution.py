"""Shards of work over replicas.

On TensorFlow, multi-device code is written once, as the program of one replica. Each replica
processes its shard of the work, reduces the intermediate results with the others, and continues
with identical values. All replicas therefore write the same values into their copies of a variable.
Without a strategy, the shard is the whole work and reductions are identities. The same holds on
JAX, where one program sees the arrays of all devices. There, `Runner.split` gives each device its
tasks, or its members if the devices do not divide the tasks; the compiler splits everything else.

On TensorFlow, work is interleaved: of `n` tasks, replica `r` of `R` takes tasks `r`, `r + R`,
`r + 2 R`, ... The assignment does not depend on how replicas are placed on hosts, and a single sum
over replicas restores the original order. On JAX, a device takes consecutive tasks, as its arrays
lie.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from keras_blur import backend

Array = Any


@dataclasses.dataclass(frozen=True)
class Shard:
    """One replica's part of the work.

    Attributes:
        index: index of the replica; an integer or a scalar int32 array.
        count: number of replicas.
        in_blocks: whether a shard is a contiguous block; if not, it is every `count`-th place.
        members: the part of the members that goes with this part of the tasks; `None` is all.
        networks: numbers of these members' initial networks, int32 `[members]`: equal numbers are
            equal networks. `None` is 0 for all.

    Example:

    >>> ALL.count, shard() is ALL
    (1, True)
    """

    index: Any = 0
    count: int = 1
    in_blocks: bool = False
    members: Shard | None = None
    networks: Any = None

    def places(self, size: int) -> Array:
        """The places of this shard among those of all, int32 `[size]`.

        Args:
            size: number of places of a shard.

        Example:

        >>> import keras
        >>> [keras.ops.convert_to_numpy(Shard(1, 2, own).places(3)).tolist() for own in (False, True)]
        [[1, 3, 5], [3, 4, 5]]
        """
        places = ops.arange(size, dtype="int32")
        return self.index * size + places if self.in_blocks else self.index + self.count * places

    def part(self, values: Any, axis: int) -> Any:
        """Selects this shard of every array in a tree along `axis`.

        Args:
            values: a tree of arrays. Those without the axis are returned unchanged.
            axis: axis to split, whose size is a multiple of `count`.

        Raises:
            ValueError: if the size of the axis is not a multiple of `count`.

        Example:

        >>> import keras
        >>> keras.ops.convert_to_numpy(Shard(1, 2).part(keras.ops.arange(6), axis=0)).tolist()
        [1, 3, 5]
        """

        def cut(value: Array) -> Array:
            if self.count == 1 or len(value.shape) <= axis:
                return value
            size = value.shape[axis]
            if size % self.count:
                raise ValueError(f"An axis of {size} cannot be split into equal shards for {self.count} replicas.")
            own = size // self.count
            two = (self.count, own) if self.in_blocks else (own, self.count)
            dealt = ops.reshape(value, (*value.shape[:axis], *two, *value.shape[axis + 1 :]))
            return ops.take(dealt, self.index, axis=self._place(axis))

        return backend.tree_map(cut, values)

    def whole(self, values: Any, axis: int) -> Any:
        """Inverse of `part`: gathers all shards in order on every replica.

        Call it in a replica context.

        Args:
            values: a tree of arrays. Those without the axis are returned unchanged.
            axis: axis that `part` split.
        """
        if self.count == 1:
            return values
        leaves = backend.leaves(values)
        wide = [value for value in leaves if len(value.shape) > axis]
        spread, place = [], self._place(axis)
        for value in wide:  # zero outside the own shard; selected, not multiplied, so NaN does not spread
            shape = [1] * place + [self.count] + [1] * (len(value.shape) - place)
            own = ops.reshape(ops.equal(ops.arange(self.count, dtype="int32"), ops.cast(self.index, "int32")), shape)
            spread.append(ops.where(own, ops.expand_dims(value, place), ops.zeros((), value.dtype)))
        joined = iter(
            ops.reshape(both, (*value.shape[:axis], -1, *value.shape[axis + 1 :]))
            for both, value in zip(backend.total(spread), wide, strict=True)
        )
        return backend.pack(values, [next(joined) if len(leaf.shape) > axis else leaf for leaf in leaves])

    def _place(self, axis: int) -> int:
        """The axis of shards, where an axis is split in two: shard, and position within it."""
        return axis if self.in_blocks else axis + 1


ALL = Shard()


def shard() -> Shard:
    """The shard of this replica inside its program; `ALL` elsewhere."""
    count = backend.replicas_of_program()
    return ALL if count == 1 else Shard(backend.replica(), count)


def mean(values: Any) -> Any:
    """Averages every array of a tree over replicas. Call it inside a replica's program.

    Args:
        values: a tree of floating-point arrays, of the same shapes on every replica.

    Example:

    >>> float(mean({"loss": ops.array(2.0)})["loss"])  # one replica
    2.0
    """
    count = backend.replicas_of_program()
    sums = backend.total(backend.leaves(values))
    return backend.pack(values, [value / ops.cast(count, value.dtype) if count > 1 else value for value in sums])
