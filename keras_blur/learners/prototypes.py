"""Prototypical networks: a learned space in which an example is of the class whose mean it is nearest to.

Source: "Prototypical Networks for Few-shot Learning" (Snell, Swersky and Zemel, NeurIPS 2017), equations 1 and 2: a class's
prototype is the mean of its embedded support, and logits are minus the squared distances to the prototypes. Learning inside
a task is that mean, so one look at the support is enough, and the outputs have no weights that could know classes by
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.distribution import ALL, Share
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer

_NAME = "embedding"


class Sums(NamedTuple):
    """Sums of embedded examples, and their numbers, by class."""

    total: Array
    count: Array


class Prototypes(MetaLearner):
    """A dense embedding, the outer parameters, and a prototype for each class.

    Args:
        hidden: units of the hidden layers.
        dimensions: of the embedding.
        activation: the hidden layers' nonlinearity.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> sorted(Prototypes(hidden=(32,), dimensions=8).draw(0, 1, features=4, outputs=5))[2:]
    ['embedding_kernel_0', 'embedding_kernel_1']
    """

    def __init__(self, hidden: tuple[int, ...] = (64,), dimensions: int = 64, activation: str = "relu"):
        dense.check(activation, hidden=hidden)
        arguments.count("dimensions", dimensions)
        self.hidden, self.dimensions, self.activation = tuple(hidden), dimensions, activation

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        return dense.draw(_NAME, (features, *self.hidden, self.dimensions), self.activation, members, [seed, 0])

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        return dense.sequential(_NAME, outer, self.activation)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        return dense.read(learned)

    def check(self, kind: str, outputs: int) -> None:
        if kind != "classes" or outputs < 2:
            raise ValueError(f"`learner` Prototypes needs tasks of two classes or more. Received: {outputs} {kind}")

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), share: Share = ALL
    ) -> Sums:
        dtype = dense.weights(_NAME, outer)[0].dtype
        return Sums(tf.zeros((*leading, outputs, self.dimensions), dtype), tf.zeros((*leading, outputs, 1), dtype))

    def step(self, outer: Outer, state: Sums, x: Array, y: Array) -> tuple[Sums, Array]:
        embedded = self._embed(outer, x)
        member = 0.5 * (y + 1.0)
        total = state.total + tf.matmul(member, embedded, transpose_a=True)  # equation 1, before the division
        count = state.count + tf.reduce_sum(member, axis=-2)[..., None]
        return Sums(total, count), _nearness(state, embedded)

    def predict(self, outer: Outer, state: Sums, x: Array) -> Array:
        return _nearness(state, self._embed(outer, x))

    def _embed(self, outer: Outer, x: Array) -> Array:
        return dense.forward(dense.weights(_NAME, outer), x, self.activation)


def _nearness(state: Sums, embedded: Array) -> Array:
    """Logits: minus the squared distances, equation 2, but for the example's own square, which a softmax does not see."""
    prototypes = state.total / tf.maximum(state.count, 1.0)
    squares = tf.reduce_sum(tf.square(prototypes), axis=-1)
    return 2.0 * tf.matmul(embedded, prototypes, transpose_b=True) - squares[..., None, :]
