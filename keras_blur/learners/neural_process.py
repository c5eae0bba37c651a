"""Conditional neural processes: the support is encoded as one vector that conditions a network.

Source: "Conditional Neural Processes" (Garnelo et al., ICML 2018), equations 1 to 3: r_i = h(x_i,
y_i); r is the mean of all r_i; the prediction is g(x, r). Learning a task is a single forward pass
and a mean. Everything else is in the outer parameters. Only the mean of values is predicted,
whereas the decoder of the paper also gives a variance.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer, keras_model
from keras_blur.learners.networks import Network
from keras_blur.learners.plain import PlainNetwork


class Encoded(NamedTuple):
    """The sum of encoded examples and their number."""

    total: Array
    count: Array


class NeuralProcess(MetaLearner):
    """An encoder and a decoder, for values and classes. Their weights are learned.

    Args:
        network: units of the hidden layers of a dense encoder and decoder; or a function from the
            shape of an example and a number of outputs to a list of Keras layers, or to a Keras
            model, as in `learners.Blur`. A function makes an embedding of `representation` numbers,
            which may end with layers without weights, such as `Flatten`. Encoder and decoder read
            it in place of the example, and are dense with a hidden layer of `representation` units.
            Batch normalisation uses the statistics of the support batch, and of the query batch
            for the query.
        representation: size of the encoded support.
        activation: hidden activation of dense networks, and of layers of `keras_blur` that have
            none.

    Raises:
        ValueError: if an argument is out of range; from `draw`, if a layer of the network is
            frozen.

    Example:

    >>> NeuralProcess((16,), representation=8).draw(0, 1, features=3, outputs=2)["decoder_kernel_0"].shape
    (1, 11, 16)
    """

    def __init__(self, network: Sequence[int] | Network = (64,), representation: int = 64, activation: str = "relu"):
        arguments.count("representation", representation)
        self._embedding = PlainNetwork("embedding", network, activation, embeds=True) if callable(network) else None
        self.network = network if callable(network) else arguments.counts("network", network)
        self.representation, self.activation = representation, activation
        hidden = (representation,) if callable(self.network) else self.network
        self._encoder, self._decoder = (PlainNetwork(name, hidden, activation) for name in ("encoder", "decoder"))

    def on(self, shape: tuple[int, ...], outputs: int) -> Self:
        if self._embedding is None:
            return self
        made = copy.copy(self)
        made._embedding = self._embedding.on(shape, self.representation)
        return made

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        made, read = {}, features
        if self._embedding is not None:
            made, read = self._embedding.draw(features, self.representation, members, [seed, 2]), self.representation
        return {
            **made,
            **self._encoder.draw(read + outputs, self.representation, members, [seed, 0]),
            **self._decoder.draw(read + self.representation, outputs, members, [seed, 1]),
        }

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """A model with inputs support x, support y and query x, `[tasks, examples, ...]`.

        A support without examples is encoded as zeros, as in the learner.
        """
        outputs = dense.weights("decoder", outer)[-1].shape[-1]
        shape: tuple[int, ...] = (dense.weights("decoder", outer)[0].shape[-2] - self.representation,)
        if self._embedding is not None:
            shape = self._embedding.plan.shape or ()
        support_x, query_x = keras.Input((None, *shape), name="support_x"), keras.Input((None, *shape), name="query_x")
        support_y = keras.Input((None, outputs), name="support_y")
        told_x, asked_x = support_x, query_x
        if self._embedding is not None:
            embed = keras.layers.TimeDistributed(self._embedding.model(outer), name="embedding")
            told_x, asked_x = embed(support_x), embed(query_x)
        encoded = keras.layers.Concatenate()([told_x, support_y])
        for layer in dense.layers("encoder", outer, self.activation):
            encoded = layer(encoded)
        count = ops.sum(ops.ones_like(encoded[:, :, :1]), axis=1, keepdims=True)
        told = ops.sum(encoded, axis=1, keepdims=True) / ops.maximum(count, 1.0)
        told = told + ops.zeros_like(asked_x[:, :, :1])  # for each x that is asked for
        decoded = keras.layers.Concatenate()([asked_x, told])
        for layer in dense.layers("decoder", outer, self.activation):
            decoded = layer(decoded)
        return dense.fill(keras.Model([support_x, support_y, query_x], decoded), outer)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        if self._embedding is None:
            return dense.read(learned, "encoder", "decoder")
        learned = keras_model(learned)
        wrapped = [getattr(layer, "layer", None) for layer in learned.layers if layer.name == "embedding"]
        if not wrapped:
            raise ValueError(f"The model must have the embedding of this learner. Received: {learned!r}")
        return {**self._embedding.read(wrapped[0]), **dense.read(learned, "encoder", "decoder")}

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> Encoded:
        dtype = dense.weights("encoder", outer)[0].dtype
        return Encoded(ops.zeros((*leading, 1, self.representation), dtype), ops.zeros((*leading, 1, 1), dtype))

    def step(self, outer: Outer, state: Encoded, x: Array, y: Array) -> tuple[Encoded, Array]:
        x = self._embedded(outer, x)
        told = ops.broadcast_to(y, (*x.shape[:-1], y.shape[-1]))
        encoded = self._encoder(self._encoder.arrays(outer), ops.concatenate([x, told], axis=-1))  # equation 1
        total = state.total + ops.sum(encoded, axis=-2, keepdims=True)
        return Encoded(total, state.count + float(x.shape[-2])), self._decoded(outer, state, x)

    def predict(self, outer: Outer, state: Encoded, x: Array) -> Array:
        return self._decoded(outer, state, self._embedded(outer, x))

    def _embedded(self, outer: Outer, x: Array) -> Array:
        return x if self._embedding is None else self._embedding(self._embedding.arrays(outer), x)

    def _decoded(self, outer: Outer, state: Encoded, x: Array) -> Array:
        told = state.total / ops.maximum(state.count, 1.0)  # equation 2
        leading = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(told.shape[:-2]))
        x = ops.broadcast_to(x, (*leading, *x.shape[-2:]))
        told = ops.broadcast_to(told, (*leading, x.shape[-2], self.representation))
        return self._decoder(self._decoder.arrays(outer), ops.concatenate([x, told], axis=-1))  # equation 3
