"""Any Keras network inside a learner: its plan, and the synapses that it starts with.

A learner is a set of pure functions. A Keras network comes in by its plan alone
(`models.reading`), and its initial synapses are drawn here from a seed, so that members start alike
and tasks do not. Kernels are normal with variance 1 / fan-in, as in all learners; an initializer
that draws nothing (zeros, ones, a constant) is taken as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_blur import arguments
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.embedding import EmbeddingConnection
from keras_blur.core.genome import Genome
from keras_blur.core.graph import Graph, chain
from keras_blur.core.network import NetworkState
from keras_blur.core.rule import Rule
from keras_blur.distribution import ALL, Shard
from keras_blur.layers.base import BlurLayer, Shape, SynapticLayer
from keras_blur.learners.base import draw_kernel
from keras_blur.models import Model, Sequential, convert

Array = Any
Network = Callable[[Shape, int], Any]

_PLACES = {"kernel": 0, "bias": 1, "backward_kernel": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A network as a learner uses it.

    Attributes:
        graph: the network.
        sources: shape of the features that enter each set of synapses.
        initializers: of each set of synapses, the initializers that draw nothing, by array.
        prepare: takes examples `[n, *shape]` to what enters the graph.
        outputs: number of outputs.
        shape: shape of an example; `None` if the graph takes rows.
    """

    graph: Graph
    sources: tuple[Shape, ...]
    initializers: tuple[dict[str, Any], ...]
    outputs: int
    prepare: Callable[[Array], Array] | None = None
    shape: Shape | None = None

    def entering(self, x: Array) -> Array:
        """Rows `[..., batch, features]` as what enters the graph."""
        if self.shape is None:
            return x
        leading = tuple(x.shape[:-1])
        x = ops.reshape(x, (*leading, *self.shape))
        if self.prepare is None:
            return x
        prepared = self.prepare(ops.reshape(x, (-1, *self.shape)))
        return ops.reshape(prepared, (*leading, *prepared.shape[1:]))

    def init(self, rule: Rule, seed: Array, leading: tuple[int, ...] = (), shard: Shard = ALL) -> NetworkState:
        """The network before the first batch; arguments as of `Learner.init`."""
        synapses = []
        holders = zip(self.graph.holders, self.sources, self.initializers, self.graph.feeds_back, strict=True)
        for index, (connection, source, given, feeds_back) in enumerate(holders):
            width = connection.units if isinstance(connection, EmbeddingConnection) else None

            def draw(
                name: str, channel: int, shape: Shape, index: int = index, given: Any = given, width: int | None = width,
                units: int = connection.units,
            ) -> Array:  # fmt: skip
                if name in given:
                    return ops.broadcast_to(ops.cast(given[name](shape), "float32"), (*leading, *shape))
                # Channel 0 of the kernel is what a learner with one kernel a layer starts with.
                fan_in = width or math.prod(shape) // units
                return draw_kernel(seed, (index, _PLACES[name], channel), shape, leading, shard, fan_in)

            synapses.append(connection.init(rule, source, draw, feeds_back=feeds_back))
        return NetworkState(tuple(synapses), ops.zeros((), "int32"))


def dense_plan(features: int, units: Sequence[int], compute_dtype: str | None = None) -> Plan:
    """A chain of dense layers on rows."""
    graph = chain([DenseConnection(one, compute_dtype=compute_dtype) for one in units])
    sources = tuple((size,) for size in (features, *units[:-1]))
    return Plan(graph, sources, tuple({"bias": keras.initializers.Zeros()} for _ in units), units[-1])


def network_plan(network: Network, rule: Rule, shape: Shape, outputs: int) -> Plan:
    """The plan of the network that a function makes for tasks.

    Args:
        network: takes the shape of an example and the number of outputs. It returns a list of
            layers or a Functional or Sequential model, of `keras.layers` or `keras_blur.layers`,
            whose last layer gives the outputs.
        rule: the rule whose synapses the layers are to have.
        shape: shape of an example.
        outputs: number of outputs.

    Raises:
        ValueError: if the function gives something else, or a network that draws random numbers,
            has another shape, several inputs or outputs, or a layer that cannot learn by a genome.
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
    drawing = [
        layer.name
        for layer in given._flatten_layers(include_self=False)
        if any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    ]
    genome = Genome.random(rule, 0)
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
    if any(reading.heads):
        raise ValueError(
            "`network` must end with a layer of synapses that gives logits or values, with nothing behind it that is not "
            f"learned, such as a softmax. Received: {given.layers[-1].name}"
        )
    return Plan(
        graph,
        tuple(layer.source for layer in reading.layers),
        tuple(_fixed(layer) for layer in reading.layers),
        outputs,
        (lambda x: reading.prepare([x], False)[0]) if reading.preparations else None,
        shape,
    )


def _fixed(layer: SynapticLayer) -> dict[str, Any]:
    """The initializers of a layer that draw nothing, by the array that starts by them."""
    chosen = {
        "kernel": layer.kernel_initializer,
        "bias": layer.bias_initializer,
        "backward_kernel": layer.backward_initializer or layer.kernel_initializer,
    }
    return {name: one for name, one in chosen.items() if "seed" not in getattr(one, "get_config", dict)()}
