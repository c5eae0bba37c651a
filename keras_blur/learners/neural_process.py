"""Conditional neural processes: the support is encoded as one vector that conditions a network.

Source: "Conditional Neural Processes" (Garnelo et al., ICML 2018), equations 1 to 3: r_i = h(x_i,
y_i); r is the mean of all r_i; the prediction is g(x, r). Learning a task is a single forward pass
and a mean. Everything else is in the outer parameters. Only the mean of values is predicted,
whereas the decoder of the paper also gives a variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer


class Encoded(NamedTuple):
    """The sum of encoded examples and their number."""

    total: Array
    count: Array


class NeuralProcess(MetaLearner):
    """A dense encoder and a dense decoder, for values and classes. Their weights are learned.

    Args:
        hidden: units of the hidden layers of the encoder and the decoder.
        representation: size of the encoded support.
        activation: hidden activation.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> NeuralProcess(hidden=(16,), representation=8).draw(0, 1, features=3, outputs=2)["decoder_kernel_0"].shape
    (1, 11, 16)
    """

    def __init__(self, hidden: tuple[int, ...] = (64,), representation: int = 64, activation: str = "relu"):
        dense.check(activation, hidden=hidden)
        arguments.count("representation", representation)
        self.hidden, self.representation, self.activation = tuple(hidden), representation, activation

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        encoder = (features + outputs, *self.hidden, self.representation)
        decoder = (features + self.representation, *self.hidden, outputs)
        return {
            **dense.draw("encoder", encoder, self.activation, members, [seed, 0]),
            **dense.draw("decoder", decoder, self.activation, members, [seed, 1]),
        }

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """A model with inputs support x, support y and query x, `[tasks, examples, ...]`.

        A support without examples is encoded as zeros, as in the learner.
        """
        features = dense.weights("decoder", outer)[0].shape[-2] - self.representation
        outputs = dense.weights("decoder", outer)[-1].shape[-1]
        support_x, query_x = keras.Input((None, features), name="support_x"), keras.Input((None, features), name="query_x")
        support_y = keras.Input((None, outputs), name="support_y")
        encoded = keras.layers.Concatenate()([support_x, support_y])
        for layer in dense.layers("encoder", outer, self.activation):
            encoded = layer(encoded)
        count = ops.sum(ops.ones_like(encoded[:, :, :1]), axis=1, keepdims=True)
        told = ops.sum(encoded, axis=1, keepdims=True) / ops.maximum(count, 1.0)
        told = told + ops.zeros_like(query_x[:, :, :1])  # for each x that is asked for
        decoded = keras.layers.Concatenate()([query_x, told])
        for layer in dense.layers("decoder", outer, self.activation):
            decoded = layer(decoded)
        return dense.fill(keras.Model([support_x, support_y, query_x], decoded), outer)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        return dense.read(learned, "encoder", "decoder")

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> Encoded:
        dtype = dense.weights("encoder", outer)[0].dtype
        return Encoded(ops.zeros((*leading, 1, self.representation), dtype), ops.zeros((*leading, 1, 1), dtype))

    def step(self, outer: Outer, state: Encoded, x: Array, y: Array) -> tuple[Encoded, Array]:
        encoder = dense.weights("encoder", outer)
        encoded = dense.forward(encoder, ops.concatenate([x, y], axis=-1), self.activation)  # equation 1
        total = state.total + ops.sum(encoded, axis=-2, keepdims=True)
        return Encoded(total, state.count + float(x.shape[-2])), self.predict(outer, state, x)

    def predict(self, outer: Outer, state: Encoded, x: Array) -> Array:
        told = state.total / ops.maximum(state.count, 1.0)  # equation 2
        leading = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(told.shape[:-2]))
        x = ops.broadcast_to(x, (*leading, *x.shape[-2:]))
        told = ops.broadcast_to(told, (*leading, x.shape[-2], self.representation))
        x = ops.concatenate([x, told], axis=-1)
        return dense.forward(dense.weights("decoder", outer), x, self.activation)  # equation 3
