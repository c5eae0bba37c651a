"""Prototypical networks: nearest class mean in a learned embedding.

Source: "Prototypical Networks for Few-shot Learning" (Snell, Swersky and Zemel, NeurIPS 2017),
equations 1 and 2. The prototype of a class is the mean of its embedded support. Logits are negative
squared distances to the prototypes. One pass over the support is enough, and the outputs have no
class-specific parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners.base import Array, MetaLearner, Outer
from keras_blur.learners.networks import Network
from keras_blur.learners.plain import PlainNetwork


class Sums(NamedTuple):
    """Sums `[..., classes, dimensions]` of embedded examples, and counts `[..., classes, 1]`."""

    total: Array
    count: Array


class TwoSides(NamedTuple):
    """The sums and counts of a single output, for labels +1 and -1 in this order."""

    total: Array
    count: Array


class Prototypes(MetaLearner):
    """An embedding with a prototype for each class in the support.

    The weights of the embedding are learned. A class without an example is never predicted.

    Args:
        network: units of the hidden layers of a dense network; or a function from the shape of an
            example and the number of outputs to a list of Keras layers, or to a Keras model, as in
            `learners.Blur`. It is given `dimensions` as the number of outputs, and may
            end with layers without weights, such as `Flatten`. Batch normalisation uses the
            statistics of the support batch, and of the query batch for the query.
        dimensions: size of the embedding.
        activation: hidden activation of a dense network, and of layers of `keras_blur` that
            have none.

    Raises:
        ValueError: if an argument is out of range; from `draw`, if a layer of the network is
            frozen.

    Example:

    >>> sorted(Prototypes((32,), dimensions=8).draw(0, 1, features=4, outputs=5))[2:]
    ['embedding_kernel_0', 'embedding_kernel_1']
    """

    def __init__(self, network: Sequence[int] | Network = (64,), dimensions: int = 64, activation: str = "relu"):
        self._net = PlainNetwork("embedding", network, activation, embeds=True)
        arguments.count("dimensions", dimensions)
        self.network, self.dimensions, self.activation = self._net.network, dimensions, activation

    def on(self, shape: tuple[int, ...], outputs: int) -> Self:
        made = copy.copy(self)
        made._net = self._net.on(shape, self.dimensions)
        return made

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        return self._net.draw(features, self.dimensions, members, [seed, 0])

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        return self._net.model(outer)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        return self._net.read(learned)

    def check(self, kind: str, outputs: int) -> None:
        if kind != "classes":
            raise ValueError(f"`learner` Prototypes needs tasks of two classes or more. Received: tasks of {kind}")

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> Sums | TwoSides:
        dtype = self._net.arrays(outer)[0].dtype
        kind, classes = (TwoSides, 2) if outputs == 1 else (Sums, outputs)
        return kind(ops.zeros((*leading, classes, self.dimensions), dtype), ops.zeros((*leading, classes, 1), dtype))

    def step(self, outer: Outer, state: Sums | TwoSides, x: Array, y: Array) -> tuple[Sums | TwoSides, Array]:
        embedded = self._embed(outer, x)
        member = 0.5 * (ops.concatenate([y, -y], axis=-1) if isinstance(state, TwoSides) else y) + 0.5
        total = state.total + ops.matmul(ops.swapaxes(member, -1, -2), embedded)  # equation 1, before the division
        count = state.count + ops.sum(member, axis=-2)[..., None]
        return type(state)(total, count), _logits(state, embedded)

    def predict(self, outer: Outer, state: Sums | TwoSides, x: Array) -> Array:
        return _logits(state, self._embed(outer, x))

    def _embed(self, outer: Outer, x: Array) -> Array:
        return self._net(self._net.arrays(outer), x)


def _logits(state: Sums | TwoSides, embedded: Array) -> Array:
    """Logits of the classes; for a single output, the difference of the two logits."""
    logits = _nearness(state, embedded)
    return logits[..., :1] - logits[..., 1:] if isinstance(state, TwoSides) else logits


def _nearness(state: Sums | TwoSides, embedded: Array) -> Array:
    """Negative squared distances (equation 2), up to the square of the embedding itself.

    The omitted term cancels in the softmax. A class without support has no prototype. Its logit is
    far enough below the log-sum-exp of the others that its probability vanishes in rounding. It is
    therefore never predicted and does not affect the loss of other classes. Its own examples have a
    finite loss with a zero gradient. If no class has support, all logits are equal.
    """
    shown = state.count > 0
    prototypes = state.total / ops.where(shown, state.count, ops.ones_like(state.count))  # zeros of those not shown
    squares = ops.sum(ops.square(prototypes), axis=-1)
    logits = 2.0 * ops.matmul(embedded, ops.swapaxes(prototypes, -1, -2)) - squares[..., None, :]
    float_type = np.finfo(keras.backend.standardize_dtype(logits.dtype))
    shown = ops.broadcast_to(shown[..., 0][..., None, :], ops.shape(logits))
    largest = ops.stop_gradient(ops.max(ops.where(shown, logits, float_type.min), axis=-1, keepdims=True))
    some = ops.any(shown, axis=-1, keepdims=True)
    largest = ops.where(some, largest, ops.zeros_like(largest))
    powers = ops.where(shown, ops.exp(ops.where(shown, logits - largest, ops.zeros_like(logits))), ops.zeros_like(logits))
    total = ops.sum(powers, axis=-1, keepdims=True)
    away = largest + ops.log(ops.where(some, total, ops.ones_like(total))) + math.log(float_type.eps)
    return ops.where(ops.logical_or(shown, ops.logical_not(some)), logits, away)
