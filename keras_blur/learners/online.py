"""Learned online rules: vector states of neurons and synapses, updated by small shared networks.

Source: "Finding online neural update rules by learning to remember" (Gregor, 2020, arXiv
2003.03124). This module follows the idea of its abstract and introduction. Every neuron and every
synapse has a small vector as its state. Two shared networks update them online and locally: a
synapse sees its own state and those of the neurons at its ends. Types of neurons differ only by an
embedding. Everything is trained by short backpropagation to remember past snippets. The paper's
equations and sizes were not available; the following are ours:

    message   m_j  = mean over i of M(w_ij, x_i)
    neuron    x_j  <- tanh F(x_j, m_j, v_j, k_j, phase, e_type(j))    some ticks for each item
    synapse   g, u = G(w_ij, x_i, x_j)                                once for each item
              w_ij <- (1 - s(g - 1)) w_ij + s(g - 1) tanh u
    read-out  R(x_j)

Here v are the shown bits and k marks where they are shown. The mean instead of a sum makes a rule
independent of the network size. The gate starts nearly closed, since items would otherwise
overwrite each other. Synapses start at zero and neurons differ only by their input, so no unit has
parameters of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer, keras_model, places

STORE, RECALL = 0, 1


class OnlineState(NamedTuple):
    """Neurons `[..., units, neuron]` and synapses `[..., from units, to units, synapse]`."""

    neurons: Array
    synapses: Array


class OnlineRule(MetaLearner):
    """A fully connected network that stores patterns by a learned rule.

    Activations are wiped before recall. Tasks are of bits, such as `tasks.remember`. There is no
    network to choose: what learns is the fully connected network itself, and its shared networks
    read vectors whose sizes the rule decides.

    Args:
        neuron: size of a neuron's state.
        synapse: size of a synapse's state.
        hidden: units of the hidden layer of each shared network.
        types: number of neuron types. Unit i has type `i % types`.
        embedding: size of the type embedding.
        ticks: neuron updates for a stored item and for a cue.
        plastic: whether synapses are updated. If not, nothing is stored: a control.
        units: number of bits of a pattern in the Keras model returned by `learned`. The rule itself
            has no fixed size.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> learner = OnlineRule()
    >>> small, large = (learner.draw(0, 1, 2 * units, units) for units in (8, 32))
    >>> sum(v.size for v in small.values()) == sum(v.size for v in large.values())
    True

    Source: after "Finding online neural update rules by learning to remember" (Gregor, 2020); the
    equations are ours.
    """

    def __init__(
        self, *, neuron: int = 4, synapse: int = 2, hidden: int = 24, types: int = 1, embedding: int = 4,
        ticks: tuple[int, int] = (2, 3), plastic: bool = True, units: int = 16,
    ):  # fmt: skip
        sizes = {"neuron": neuron, "synapse": synapse, "hidden": hidden, "types": types, "embedding": embedding}
        for name, value in (*sizes.items(), ("units", units)):
            arguments.count(name, value)
        if len(arguments.counts("ticks", ticks)) != 2:
            raise ValueError(f"`ticks` must be two positive integers. {arguments.received('ticks', ticks)}")
        arguments.flag("plastic", plastic)
        self.neuron, self.synapse, self.hidden, self.types, self.embedding = neuron, synapse, hidden, types, embedding
        self.ticks, self.plastic, self.units = (ticks[STORE], ticks[RECALL]), plastic, units

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        sizes = {
            "message": (self.synapse + self.neuron, self.synapse),
            "body": (self.neuron + self.synapse + 4 + self.embedding, self.neuron),
            "write": (self.synapse + 2 * self.neuron, 2 * self.synapse),
            "read": (self.neuron, 1),
        }
        made: dict[str, np.ndarray] = {}
        for number, (name, (before, after)) in enumerate(sizes.items()):
            made |= dense.draw(name, (before, self.hidden, after), "tanh", members, [seed, number])
        rng = np.random.default_rng([seed, len(sizes)])
        made["types"] = rng.standard_normal((members, self.types, self.embedding)).astype(np.float32)
        return made

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """A model of sequences `[batch, time, 2 units + 1]`: an `OnlineCell` in
        `keras.layers.RNN`.

        Args:
            outer: arrays by name, without the axis of members.
        """
        cell = OnlineCell(
            self.units, neuron=self.neuron, synapse=self.synapse, hidden=self.hidden, types=self.types,
            embedding=self.embedding, ticks=self.ticks, plastic=self.plastic,
        )  # fmt: skip
        model = keras.Sequential([keras.Input((None, 2 * self.units + 1)), keras.layers.RNN(cell, return_sequences=True)])
        for name, value in outer.items():
            cell.outer[name].assign(value)
        return model

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        cells = [getattr(place.layer, "cell", None) for place in places(keras_model(learned)).values()]
        found = [cell for cell in cells if isinstance(cell, OnlineCell)]
        if not found:
            raise ValueError(f"The model must have an OnlineCell. Received: {learned!r}")
        return {name: backend.numbers_of(variable)[None] for name, variable in found[0].outer.items()}

    def check(self, kind: str, outputs: int) -> None:
        if kind != "bits":
            raise ValueError(f"`learner` OnlineRule needs tasks of bits, such as tasks.remember. Received: tasks of {kind}")

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> OnlineState:
        dtype = outer["types"].dtype
        neurons = ops.zeros((*leading, outputs, self.neuron), dtype)
        return OnlineState(neurons, ops.zeros((*leading, outputs, outputs, self.synapse), dtype))

    def step(self, outer: Outer, state: OnlineState, x: Array, y: Array) -> tuple[OnlineState, Array]:
        neurons, synapses = state
        for item in range(x.shape[-2]):  # one after the other
            neurons = self._settled(outer, neurons, synapses, x[..., item, :], STORE)
            if self.plastic:
                synapses = self._written(outer, neurons, synapses)
        return OnlineState(neurons, synapses), self.predict(outer, state, x)

    def predict(self, outer: Outer, state: OnlineState, x: Array) -> Array:
        """Recalls patterns. Neurons are wiped before each cue.

        Args:
            outer: the outer parameters.
            state: from `init` or `step`.
            x: cues `[..., batch, 2 units]`: the shown bits, 0 elsewhere, and their mask.

        Returns:
            Logits `[..., batch, units]` of the bits.
        """
        wiped = ops.zeros_like(state.neurons)[..., None, :, :]
        wiped = ops.broadcast_to(wiped, (*ops.shape(wiped)[:-3], x.shape[-2], *wiped.shape[-2:]))
        neurons = self._settled(outer, wiped, state.synapses[..., None, :, :, :], x, RECALL)
        return _shared("read", outer, neurons)[..., 0]

    def _settled(self, outer: Outer, neurons: Array, synapses: Array, x: Array, phase: int) -> Array:
        """Neurons `[..., units, neuron]` after several ticks under an input `[..., 2 units]`."""
        leading, units = ops.shape(neurons)[:-2], neurons.shape[-2]
        synapses = ops.broadcast_to(synapses, (*leading, units, units, self.synapse))
        shown = ops.stack([x[..., :units], x[..., units:]], axis=-1)
        told = ops.convert_to_tensor(np.eye(2)[phase], dtype=x.dtype)
        types = ops.take(outer["types"], np.arange(units) % self.types, axis=-2)
        types = ops.reshape(types, (*types.shape[:-2], *[1] * (len(leading) - len(types.shape) + 2), *types.shape[-2:]))
        fixed = [ops.broadcast_to(own, (*leading, units, own.shape[-1])) for own in (shown, told, types)]
        for _ in range(self.ticks[phase]):
            sender = ops.broadcast_to(neurons[..., :, None, :], (*leading, units, units, self.neuron))
            message = backend.mean(_shared("message", outer, ops.concatenate([synapses, sender], axis=-1)), -3)
            neurons = backend.tanh(_shared("body", outer, ops.concatenate([neurons, message, *fixed], axis=-1)))
        return neurons

    def _written(self, outer: Outer, neurons: Array, synapses: Array) -> Array:
        """Synapses after an item."""
        square = (*ops.shape(synapses)[:-1], self.neuron)
        ends = [ops.broadcast_to(neurons[..., :, None, :], square), ops.broadcast_to(neurons[..., None, :, :], square)]
        gate, value = ops.split(_shared("write", outer, ops.concatenate([synapses, *ends], axis=-1)), 2, axis=-1)
        gate = ops.sigmoid(gate - 1.0)
        return (1.0 - gate) * synapses + gate * backend.tanh(value)


def _shared(name: str, outer: Outer, values: Array) -> Array:
    """Applies a shared network to each vector of `[..., size]`."""
    arrays, sizes = dense.weights(name, outer), ops.shape(values)
    leading = sizes[: len(arrays[0].shape) - 2]
    rows = ops.reshape(values, (*leading, -1, sizes[-1]))
    found = dense.forward(arrays, rows, "tanh")
    return ops.reshape(found, (*sizes[:-1], found.shape[-1]))


@keras.saving.register_keras_serializable(package="keras_blur")
class OnlineCell(keras.layers.Layer):
    """The rule as a cell of `keras.layers.RNN`. Each step of a sequence stores or recalls an item.

    Inputs `[batch, 2 units + 1]` hold the bits as +1 and -1 (0 if not shown), a mask of the shown
    bits, and a final number: 0 to store the item, 1 to recall. Outputs `[batch, units]` are the
    logits of the bits before the item is stored.

    Args:
        units: number of bits of an item.
        name: as in every Keras layer.
        dtype: as in every Keras layer.
        trainable: as in every Keras layer.
        **options: options of `OnlineRule` except `units`.

    Raises:
        ValueError: if an option is out of range, or the inputs have another number of features.

    Example:

    >>> import keras
    >>> layer = keras.layers.RNN(OnlineCell(8))
    >>> tuple(layer(keras.ops.zeros((3, 5, 17))).shape)
    (3, 8)
    """

    def __init__(self, units: int, *, name: str | None = None, dtype: Any = None, trainable: bool = True, **options: Any):
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.rule = OnlineRule(units=units, **options)
        self.units, self.options, self.output_size = units, options, units
        self.state_size = [units * self.rule.neuron, units * units * self.rule.synapse]
        self.outer: dict[str, keras.Variable] = {}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if input_shape[-1] != 2 * self.units + 1:
            raise ValueError(f"Inputs must have 2 * units + 1 = {2 * self.units + 1} numbers. Received: {input_shape}")
        for name, value in self.rule.draw(0, 1, 2 * self.units, self.units).items():
            made = self.add_weight(name=name, shape=value.shape[1:], initializer="zeros", trainable=self.trainable)
            made.assign(value[0])
            setattr(self, f"outer_{name}", made)  # where Keras finds what to save
            self.outer[name] = made

    def call(self, inputs: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        outer = {name: backend.value_of(variable) for name, variable in self.outer.items()}
        neurons = ops.reshape(states[0], (-1, self.units, self.rule.neuron))
        synapses = ops.reshape(states[1], (-1, self.units, self.units, self.rule.synapse))
        old = OnlineState(neurons, synapses)
        new, logits = self.rule.step(outer, old, inputs[:, None, :-1], None)
        store = inputs[:, -1:] < 0.5
        learned = [ops.reshape(value, ops.shape(state)) for value, state in zip(new, states, strict=True)]
        kept = [ops.where(store, value, state) for value, state in zip(learned, states, strict=True)]
        return logits[:, 0], kept

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, **dict(self.options)}
