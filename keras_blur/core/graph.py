"""The plan of a network: layers of neurons, connections that end in them, and maps without synapses
between them.

A plan is read once, from a chain of connections or from Keras's Functional graph, and knows no
Keras model. Every array of states is a *value* with a number: the inputs come first, then the
result of each operation. An operation names the values that it reads. So residual sums,
concatenations, layers used twice, several inputs and several outputs need no code of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from keras_blur.core.connection import Connection
from keras_blur.core.genome import Genome
from keras_blur.core.weightless import WeightlessMap


@dataclasses.dataclass(frozen=True, eq=False)
class Connect:
    """A connection that ends in a layer of neurons.

    Attributes:
        connection: its operations.
        holder: number of its synapses. A layer used twice has two connections and one holder.
        source: number of the value that it reads.
        target: number of the value that it gives: the neurons.
        learns: whether its synapses are updated.
    """

    connection: Connection
    holder: int
    source: int
    target: int
    learns: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """A map without synapses.

    Attributes:
        map: the map.
        sources: numbers of the values that it reads.
        target: number of the value that it gives.
    """

    map: WeightlessMap
    sources: tuple[int, ...]
    target: int


Operation = Connect | Pass


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A network as a list of operations, each of which reads only inputs and earlier results.

    Attributes:
        features: number of feature axes of each input.
        operations: what is computed.
        outputs: numbers of the values that receive feedback.
        groups: for each holder, which of the genome's layers it learns with (`Rule.layers`);
            `()` if holder i learns with layer i.
    """

    features: tuple[int, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]
    groups: tuple[int, ...] = ()

    def genome(self, genome: Genome, holder: int) -> Genome:
        """The genome by which a set of synapses learns."""
        return genome.layer(self.groups[holder] if self.groups else holder)

    @functools.cached_property
    def connects(self) -> tuple[Connect, ...]:
        """The connections, in order."""
        return tuple(one for one in self.operations if isinstance(one, Connect))

    @functools.cached_property
    def nodes(self) -> tuple[int, ...]:
        """Numbers of the values that are inputs or layers of neurons."""
        return (*range(len(self.features)), *(one.target for one in self.connects))

    @functools.cached_property
    def holders(self) -> tuple[Connection, ...]:
        """The connection of each set of synapses."""
        found: dict[int, Connection] = {}
        for one in self.connects:
            found.setdefault(one.holder, one.connection)
        return tuple(found[holder] for holder in range(len(found)))

    @functools.cached_property
    def uses(self) -> tuple[int, ...]:
        """For each holder, the number of its connections that learn."""
        found = [0] * len(self.holders)
        for one in self.connects:
            found[one.holder] += one.learns
        return tuple(found)

    @functools.cached_property
    def axes(self) -> tuple[int, ...]:
        """Number of feature axes of each value."""
        return (
            *self.features,
            *(one.connection.target_axes if isinstance(one, Connect) else len(one.map.target) for one in self.operations),
        )

    def holder_of(self, number: int) -> int:
        """The holder of the layer of neurons that a value is, or of the first such layer that it
        comes from."""
        one = self.operations[number - len(self.features)]
        if isinstance(one, Connect):
            return one.holder
        return self.holder_of(next(source for source in one.sources if source in self.after_synapses))

    @functools.cached_property
    def last(self) -> frozenset[int]:
        """Numbers of the layers of neurons from which no path leads to another one."""
        leads: set[int] = set()
        ends = []
        for one in reversed(self.operations):
            if isinstance(one, Connect):
                if one.target not in leads:
                    ends.append(one.target)
                leads.add(one.source)
            elif one.target in leads:
                leads.update(one.sources)
        return frozenset(ends)

    def _below(self, learning: bool) -> frozenset[int]:
        found: set[int] = set()
        for one in self.operations:
            if isinstance(one, Connect):
                if one.source in found or one.learns or not learning:
                    found.add(one.target)
            elif any(source in found for source in one.sources):
                found.add(one.target)
        return frozenset(found)

    @functools.cached_property
    def after_synapses(self) -> frozenset[int]:
        """Numbers of the values downstream of some synapses."""
        return self._below(False)

    @functools.cached_property
    def after_learning(self) -> frozenset[int]:
        """Numbers of the values downstream of synapses that learn: the feedback has to reach
        these."""
        return self._below(True)

    @functools.cached_property
    def merges_inputs(self) -> bool:
        """Whether a map reads inputs, or what follows from these alone, beside the results of
        synapses."""
        below = self.after_synapses
        passes = [one.sources for one in self.operations if isinstance(one, Pass)]
        return any(len({source in below for source in sources}) > 1 for sources in passes)

    @functools.cached_property
    def feeds_back(self) -> tuple[bool, ...]:
        """For each holder, whether synapses stand before it in the network, so that it needs a
        feedback path."""
        found = [False] * len(self.holders)
        for one in self.connects:
            found[one.holder] |= one.source in self.after_synapses
        return tuple(found)


class Builder:
    """Makes a `Graph` operation by operation.

    Args:
        features: number of feature axes of each input.

    Example:

    >>> from keras_blur.core.connections.dense import DenseConnection
    >>> builder = Builder([1])
    >>> hidden = builder.connect(DenseConnection(8), 0)
    >>> builder.graph([builder.connect(DenseConnection(3), hidden)]).nodes
    (0, 1, 2)
    """

    def __init__(self, features: Sequence[int]):
        self._features = tuple(features)
        self._operations: list[Operation] = []
        self._holders: dict[Any, int] = {}

    @property
    def _next(self) -> int:
        return len(self._features) + len(self._operations)

    def connect(self, connection: Connection, source: int, *, key: Any = None, learns: bool = True) -> int:
        """Adds a connection and returns the number of its neurons.

        Args:
            connection: its operations.
            source: number of the value that it reads.
            key: identifies its synapses; connections with the same key share them. `None`: not
                shared.
            learns: whether its synapses are updated.
        """
        holder = self._holders.setdefault(object() if key is None else key, len(self._holders))
        self._operations.append(Connect(connection, holder, source, self._next, learns))
        return self._next - 1

    def map(self, weightless: WeightlessMap, *sources: int) -> int:
        """Adds a map without synapses and returns the number of its value."""
        self._operations.append(Pass(weightless, sources, self._next))
        return self._next - 1

    def graph(self, outputs: Sequence[int]) -> Graph:
        """The network with these values as outputs."""
        return Graph(self._features, tuple(self._operations), tuple(outputs))


def chain(connections: Sequence[Connection], features: int = 1) -> Graph:
    """A network of connections, one after the other, on inputs with that many feature axes.

    Example:

    >>> from keras_blur.core.connections.dense import DenseConnection
    >>> len(chain([DenseConnection(8), DenseConnection(3)]).holders)
    2
    """
    builder = Builder([features])
    value = 0
    for connection in connections:
        value = builder.connect(connection, value)
    return builder.graph([value])
