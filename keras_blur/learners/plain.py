"""Networks of ordinary neurons inside learners: weights as plain arrays, and the outputs as a
function of them.

A dense network is written out in `learners.dense`. Any other is a plan of the core, as in
`learners.Blur`, read by the genome that is backpropagation. Of this genome only the forward pass is
used: it computes state 1 alone, which is the output of the Keras network. Learners take gradients
by automatic differentiation. Initial weights are those of `learners.Blur` for the same seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, genomes
from keras_blur.core import network as core
from keras_blur.core.connection import over_leading
from keras_blur.distribution import ALL, Shard
from keras_blur.layers.base import Shape, numbers_of
from keras_blur.learners import dense
from keras_blur.learners.base import draw_kernel, keras_model
from keras_blur.learners.networks import Network, NetworkPlan, fan_in, known_plan, network_plan
from keras_blur.models.convert import convert, to_keras

Array = Any


class PlainNetwork:
    """A network as arrays: kernels `[..., *kernel_shape]` and biases `[..., 1, units]`.

    Args:
        name: prefix of the names of the arrays.
        network: units of the hidden layers of a dense network, or a function from the shape of an
            example and the number of outputs to Keras layers or a Keras model.
        activation: nonlinearity of the hidden layers of a dense network, and of layers of
            `keras_blur` that have none.
        known: names that `activation` may have.
        embeds: whether the network is an embedding, learned by the outer loss alone. The network of
            a function may then end with layers without weights. It must have no regularizers or
            constraints.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> net = PlainNetwork("start", (8,), "tanh")
    >>> net.draw(4, 3, members=2, seed=[0])["start_kernel_0"].shape
    (2, 4, 8)
    """

    def __init__(
        self,
        name: str,
        network: Sequence[int] | Network,
        activation: str,
        known: Sequence[str] = dense.KERAS_ACTIVATIONS,
        *,
        embeds: bool = False,
    ):
        arguments.choice("activation", activation, known)
        self.name, self.activation, self.embeds = name, activation, embeds
        self.network: tuple[int, ...] | Network = network if callable(network) else arguments.counts("network", network)
        self.genome = genomes.backprop(1.0, activation)
        self._plan: NetworkPlan | None = None  # of a function's network, once the shape is known

    def on(self, shape: Shape, outputs: int) -> Self:
        """The network for examples of a shape.

        Raises:
            ValueError: if the function gives a network that cannot be used.
        """
        if not callable(self.network):
            return self
        made = copy.copy(self)
        plan = network_plan(self.network, self.genome, tuple(shape), outputs, head=self.embeds)
        assert plan.model is not None  # of a function
        layers = zip(plan.model.reading.layers, plan.graph.holders, strict=True)
        limited = [layer.name for layer, connection in layers if connection.penalties or connection.limits]
        if self.embeds and limited:
            raise ValueError(
                "`network` must have no regularizers and no constraints: it is an embedding, which is learned by the outer "
                f"loss alone. Received: some in {', '.join(limited)}"
            )
        made._plan = plan
        return made

    @property
    def plan(self) -> NetworkPlan:
        """The plan of a function's network.

        Raises:
            ValueError: if `on` has not told it the shape of an example.
        """
        return known_plan(self._plan)

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in order."""
        kinds: Sequence[Any]
        kinds = self.plan.shapes if callable(self.network) else [("kernel", "bias")] * (len(self.network) + 1)
        return [f"{self.name}_{kind}_{index}" for index, own in enumerate(kinds) for kind in own]

    @property
    def _ranks(self) -> list[int]:
        """Number of own axes of each array."""
        if not callable(self.network):
            return [2] * len(self.names)
        return [len(shape) - 1 for own in self.plan.shapes for shape in own.values()]

    def arrays(self, outer: Mapping[str, Array]) -> tuple[Array, ...]:
        """The network's arrays among others by name, in order."""
        return tuple(outer[name] for name in self.names)

    def named(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """The inverse of `arrays`."""
        return dict(zip(self.names, arrays, strict=True))

    def spread(self, arrays: Sequence[Array], leading: tuple[int, ...]) -> tuple[Array, ...]:
        """The arrays broadcast to the given leading axes."""
        return tuple(
            ops.broadcast_to(one, (*leading, *one.shape[len(one.shape) - rank :]))
            for one, rank in zip(arrays, self._ranks, strict=True)
        )

    def init(
        self, features: int, outputs: int, seed: Array, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> tuple[Array, ...]:
        """The arrays with which `learners.Blur` starts; arguments as in `Learner.init`."""
        if callable(self.network):
            state = known_plan(self._plan, features, outputs).init(self.genome.rule, seed, leading, shard)
            pairs = zip(self.plan.shapes, state.synapses, strict=True)
            return tuple(ops.squeeze(own[kind], -len(shape)) for shapes, own in pairs for kind, shape in shapes.items())
        weights: list[Array] = []
        before = features
        for index, units in enumerate((*self.network, outputs)):
            weights.append(draw_kernel(seed, (index, 0, 0), (before, units), leading, shard))
            weights.append(ops.zeros((*leading, 1, units), "float32"))
            before = units
        return tuple(weights)

    def draw(self, features: int, outputs: int, members: int, seed: Sequence[int]) -> dict[str, np.ndarray]:
        """Initial arrays by name, `[members, ...]`.

        Kernels are normal with variance 1 / fan-in, or 2 / fan-in if `activation` is a relu. An
        initializer that draws no random numbers is used unchanged.

        Raises:
            ValueError: if a layer is frozen, since all of the arrays are learned.
        """
        if not callable(self.network):
            return dense.draw(self.name, (features, *self.network, outputs), self.activation, members, seed)
        plan = known_plan(self._plan, features, outputs)
        assert plan.model is not None  # of a function
        frozen = [layer.name for layer, uses in zip(plan.model.reading.layers, plan.graph.uses, strict=True) if not uses]
        if frozen:
            raise ValueError(
                "`network` must have no frozen layers where its weights are outer parameters, which are learned. "
                f"Received: trainable=False in {', '.join(frozen)}"
            )
        rng, found = np.random.default_rng(seed), []
        gain = 2.0 if self.activation == "relu" else 1.0
        for connection, given, shapes in zip(plan.graph.holders, plan.initializers, plan.shapes, strict=True):
            for kind, (_, *shape) in shapes.items():
                if kind in given:
                    own = np.broadcast_to(ops.convert_to_numpy(given[kind](tuple(shape))), (members, *shape))
                else:
                    own = math.sqrt(gain / fan_in(connection, tuple(shape))) * rng.standard_normal((members, *shape))
                found.append(own.astype(np.float32))
        return self.named(found)

    def __call__(self, arrays: Sequence[Array], x: Array) -> Array:
        """Outputs `[..., batch, outputs]` of rows `[..., batch, features]`; leading axes broadcast.

        Batch normalisation uses the statistics of the batch at hand, for each network its own.
        """
        if not callable(self.network):
            return dense.forward(arrays, x, self.activation)
        plan = self.plan
        own = [tuple(one.shape[: len(one.shape) - rank]) for one, rank in zip(arrays, self._ranks, strict=True)]
        leading = np.broadcast_shapes(*own, tuple(x.shape[:-2]))
        given = iter(self.spread(arrays, leading))
        x = ops.broadcast_to(x, (*leading, *x.shape[-2:]))
        synapses = []
        for shapes, uses in zip(plan.shapes, plan.graph.uses, strict=True):
            held = {kind: ops.expand_dims(next(given), -len(shape)) for kind, shape in shapes.items()}
            synapses.append(held if uses else {kind: ops.stop_gradient(one) for kind, one in held.items()})  # frozen
        sweep = core.forward(self.genome, plan.graph, synapses, plan.entering(x, synapses), training=True)
        found = core.output(self.genome, plan.graph, sweep.values)
        for one in plan.head:
            axis = -2 - len(one.sources[0])
            states = (ops.expand_dims(found, axis),)
            found = ops.squeeze(one.forward(states, one.context(states, True)), -2 - len(one.target))
        return found

    def penalty(self, arrays: Sequence[Array]) -> Array | float:
        """The sum over all networks of what their regularizers add to the loss."""
        penalties = self._applied("penalties", arrays)
        return sum((ops.sum(value) for value in penalties if value is not None), 0.0)

    def limited(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The arrays as their constraints leave them."""
        limits = self._applied("limits", arrays)
        return tuple(one if value is None else value for one, value in zip(arrays, limits, strict=True))

    def _applied(self, kind: str, arrays: Sequence[Array]) -> list[Array | None]:
        """The functions of a kind, `"penalties"` or `"limits"`, of the arrays that are learned.

        `None` for arrays without a function.
        """
        if not callable(self.network):
            return [None] * len(arrays)
        given, found = iter(arrays), []
        for connection, shapes, uses in zip(self.plan.graph.holders, self.plan.shapes, self.plan.graph.uses, strict=True):
            functions = getattr(connection, kind) if uses else {}
            for name, shape in shapes.items():
                own, function = next(given), functions.get(name)
                leading = ops.ndim(own) - len(shape) + 1  # a single network has one channel
                found.append(None if function is None else over_leading(function, own, leading))
        return found

    def model(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """The network as a Keras model.

        Its batch normalisation has Keras's initial moving statistics. `model(x, training=True)`
        uses those of the batch, as the learner does.
        """
        if not callable(self.network):
            return dense.sequential(self.name, outer, self.activation)
        made = self.plan.model
        assert made is not None  # of a function
        given = iter(self.arrays(outer))
        for layer, shapes in zip(made.reading.layers, self.plan.shapes, strict=True):
            for kind in shapes:
                layer.synapses[kind].assign(next(given)[None])
        return to_keras(made)

    def read(self, model: Any) -> dict[str, np.ndarray]:
        """The arrays of one member, `[1, ...]`, from a model made by `model`, or from its file.

        Raises:
            ValueError: if it does not have the layers of this network.
        """
        if not callable(self.network):
            return dense.read(model, self.name)
        shapes = self.plan.shapes
        layers = convert(keras_model(model), self.genome).reading.layers
        found = [{kind: numbers_of(one) for kind, one in layer.synapses.items()} for layer in layers]
        if [{kind: one.shape for kind, one in own.items()} for own in found] != [dict(own) for own in shapes]:
            raise ValueError(f"The model must have the layers of this learner's network. Received: {model!r}")
        return self.named([one for own in found for one in own.values()])
