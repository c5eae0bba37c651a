"""Any Keras network inside a learner: its plan, and the synapses that it starts with.

A learner is a set of pure functions. A Keras network enters only as its plan (`models.reading`).
Its initial synapses are drawn here from a seed, so that members start alike and tasks do not.
Kernels are normal with variance 1 / fan-in, as in all learners; an initializer that draws no random
numbers (zeros, ones, a constant) is used unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.core.connection import Connection
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.embedding import EmbeddingConnection
from keras_blur.core.genome import Genome
from keras_blur.core.graph import Graph, chain
from keras_blur.core.network import NetworkState
from keras_blur.core.rule import Rule
from keras_blur.core.weightless import WeightlessMap
from keras_blur.distribution import ALL, Shard
from keras_blur.layers.base import BlurLayer, Shape, SynapticLayer, seed_generators
from keras_blur.learners.base import draw_kernel
from keras_blur.models import Model, Sequential, convert
from keras_blur.models.base import BlurModel

Array = Any
Network = Callable[[Shape, int], Any]

_PLACES = {"kernel": 0, "bias": 1, "backward_kernel": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkPlan:
    """A network as a learner uses it.

    Attributes:
        graph: the network.
        sources: shape of the features that enter each set of synapses.
        initializers: for each set of synapses, the initializers that draw no random numbers, by
            array.
        prepare: takes examples `[n, *shape]` to the arrays that enter the graph.
        outputs: number of outputs.
        shape: shape of an example; `None` if the graph takes rows.
        model: the network as a model that learns with a genome; `None` if the graph takes rows.
        head: maps after the last layer of synapses.
    """

    graph: Graph
    sources: tuple[Shape, ...]
    initializers: tuple[dict[str, Any], ...]
    outputs: int
    prepare: Callable[[Array], list[Array]] | None = None
    shape: Shape | None = None
    model: BlurModel | None = None
    head: tuple[WeightlessMap, ...] = ()

    def entering(self, x: Array, synapses: Sequence[Mapping[str, Array]]) -> Any:
        """Rows `[..., batch, features]` as what enters the graph: an array, or a tuple of several.

        They get the leading axes of the synapses where a map reads them beside the results of
        these, as a sum around a layer does.
        """
        if self.shape is None:
            return x
        rows = tuple(x.shape[:-1])
        examples = ops.reshape(x, (-1, *self.shape))
        entered = [examples] if self.prepare is None else self.prepare(examples)
        entered = [ops.reshape(one, (*rows, *one.shape[1:])) for one in entered]
        if self.graph.merges_inputs:
            name, shape = next(iter(self.shapes[0].items()))
            own = synapses[0][name].shape
            leading = np.broadcast_shapes(tuple(own[: len(own) - len(shape)]), rows[:-1])
            entered = [ops.broadcast_to(one, (*leading, *one.shape[len(rows) - 1 :])) for one in entered]
        return entered[0] if len(entered) == 1 else tuple(entered)

    @functools.cached_property
    def shapes(self) -> tuple[dict[str, Shape], ...]:
        """For each set of synapses, the shapes of kernel and bias, with one channel."""
        rule = Rule(channels="tied", directions="tied")
        holders = zip(self.graph.holders, self.sources, strict=True)
        return tuple(connection.shapes(rule, source, feeds_back=False) for connection, source in holders)

    def init(self, rule: Rule, seed: Array, leading: tuple[int, ...] = (), shard: Shard = ALL) -> NetworkState:
        """The network before the first batch; arguments as in `Learner.init`."""
        synapses = []
        holders = zip(self.graph.holders, self.sources, self.initializers, self.graph.feeds_back, strict=True)
        for index, (connection, source, given, feeds_back) in enumerate(holders):

            def draw(
                name: str, channel: int, shape: Shape, index: int = index, given: Any = given,
                connection: Connection = connection,
            ) -> Array:  # fmt: skip
                if name in given:
                    return ops.broadcast_to(ops.cast(given[name](shape), "float32"), (*leading, *shape))
                # Channel 0 of the kernel is what a learner with one kernel per layer starts with.
                return draw_kernel(seed, (index, _PLACES[name], channel), shape, leading, shard, fan_in(connection, shape))

            synapses.append(connection.init(rule, source, draw, feeds_back=feeds_back))
        return NetworkState(tuple(synapses), ops.zeros((), "int32"))


def fan_in(connection: Connection, shape: Shape) -> int:
    """Number of inputs of a unit, by which initial weights are scaled; for vectors of an embedding,
    their size."""
    return connection.units if isinstance(connection, EmbeddingConnection) else math.prod(shape) // connection.units


def dense_plan(features: int, units: Sequence[int], compute_dtype: str | None = None) -> NetworkPlan:
    """A chain of dense layers on rows."""
    graph = chain([DenseConnection(one, compute_dtype=compute_dtype) for one in units])
    sources = tuple((size,) for size in (features, *units[:-1]))
    return NetworkPlan(graph, sources, tuple({"bias": keras.initializers.Zeros()} for _ in units), units[-1])


def network_plan(network: Network, genome: Genome, shape: Shape, outputs: int, *, head: bool = False) -> NetworkPlan:
    """The plan of the network that a function makes for tasks.

    Args:
        network: takes the shape of an example and the number of outputs. It returns a list of
            layers or a Functional or Sequential model, of `keras.layers` or `keras_blur.layers`,
            whose last layer gives the outputs.
        genome: the genome of the network, whose rule says which synapses the layers are to have.
        shape: shape of an example.
        outputs: number of outputs.
        head: whether maps may follow the last layer of synapses, as a `Flatten` does.

    Raises:
        ValueError: if the function gives something else, or a network that draws random numbers,
            has another shape, several inputs or outputs, or a layer that cannot learn with a
            genome.
    """
    given = network(shape, outputs)
    if isinstance(given, (list, tuple)) and all(isinstance(layer, keras.Layer) for layer in given):
        given = keras.Sequential([keras.Input(shape), *given])
    if not isinstance(given, keras.Model) or not given.built:
        raise ValueError(
            f"`network` must return a list of Keras layers or a built Keras model. {arguments.received('network', given)}"
        )
    inside, outside = tuple(given.input_shape[1:]), tuple(given.output_shape[1:])
    if (inside, outside) != (shape, (outputs,)):
        raise ValueError(
            f"`network` must take one input of shape {shape} and have one output of shape {(outputs,)}. "
            f"Received: inputs {given.input_shape} and outputs {given.output_shape}"
        )
    drawing = [layer.name for layer in given._flatten_layers(include_self=False) if seed_generators(layer)]
    if not any(isinstance(layer, BlurLayer) for layer in given._flatten_layers(include_self=False)):
        model = convert(given, genome)
    elif isinstance(given, keras.Sequential):
        model = Sequential([keras.layers.InputLayer(batch_shape=given.input_shape), *given.layers], genome=genome)
    else:
        model = Model(given.inputs[0], given.outputs[0], genome=genome)
    reading = model.reading
    graph = reading.learning([layer.trainable for layer in reading.layers])
    if drawing:
        raise ValueError(
            "`network` must have no layer that draws random numbers: a learner's numbers follow from its seed. "
            f"Received: {', '.join(drawing)}"
        )
    if any(reading.heads) and not head:
        raise ValueError(
            "`network` must end with a layer of synapses that gives logits or values, with nothing after it that is not "
            f"learned, such as a softmax. Received: {given.layers[-1].name}"
        )
    return NetworkPlan(
        graph,
        tuple(layer.source for layer in reading.layers),
        tuple(_fixed(layer) for layer in reading.layers),
        outputs,
        (lambda x: reading.prepare([x], False)) if reading.preparations else None,
        shape,
        model,
        reading.heads[0],
    )


def known_plan(plan: NetworkPlan | None, features: int | None = None, outputs: int | None = None) -> NetworkPlan:
    """The plan of a function's network.

    Args:
        plan: that of the learner; `None` if the learner was not told the shape of an example.
        features: number of features of the examples; `None` for any plan.
        outputs: number of outputs, where `features` is given.

    Raises:
        ValueError: if there is none, or it is one of another size.
    """
    sized = features is not None
    if plan is None or (sized and (math.prod(plan.shape or ()), plan.outputs) != (features, outputs)):
        raise ValueError(
            "A learner whose network is a function must know the shape of an example: use learner.on(shape, outputs)"
            + (f" for {features} features and {outputs} outputs" if sized else "")
            + ". Received: "
            + ("a learner without it" if plan is None else f"learner.on({plan.shape}, {plan.outputs})")
        )
    return plan


def _fixed(layer: SynapticLayer) -> dict[str, Any]:
    """The initializers of a layer that draw no random numbers, by the array that they
    initialise."""
    chosen = layer.plain_initializers(layer.source)
    return {name: one for name, one in chosen.items() if "seed" not in getattr(one, "get_config", dict)()}
