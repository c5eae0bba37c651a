"""The baseline: a network trained by a Keras optimizer.

It has the same interface, batches and initial networks as the other learners, so a comparison only
compares the rules.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

import keras
from keras import ops

from keras_blur import backend
from keras_blur.core.rule import ACTIVATIONS
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import updates
from keras_blur.learners.base import Array, Learner, Outer
from keras_blur.learners.networks import Network
from keras_blur.learners.plain import PlainNetwork


class BaselineState(NamedTuple):
    """Kernels and biases by layer, two moment arrays for each, and the step number."""

    weights: tuple[Array, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]
    step: Array


class BaselineLearner(Learner):
    """A network trained by a Keras optimizer.

    Args:
        optimizer: a Keras SGD (with or without momentum), Adam or RMSprop. Only its rates and
            coefficients may be set.
        network: units of the hidden layers of a dense network; or a function from the shape of an
            example and the number of outputs to a list of Keras layers, or to a Keras model, as in
            `learners.Blur`. It starts with the weights of `Blur`. Batch normalisation uses the
            statistics of the batch at hand, in predictions too. Regularizers and constraints of
            its layers act as in `fit`.
        activation: hidden activation of a dense network, one known to `Rule`, and of layers of
            `keras_blur` that have none.
        loss: training loss: `"cross_entropy"` (softmax, or logistic for a single output) or
            `"squared"` (mean squared error).

    Raises:
        ValueError: if the optimizer is not supported or an argument is out of range.

    Example:

    >>> BaselineLearner(keras.optimizers.SGD(0.1), (32,)).network
    (32,)
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        network: Sequence[int] | Network = (128,),
        activation: str = "tanh",
        *,
        loss: str = "cross_entropy",
    ):
        updates.check_optimizer(optimizer)
        self._net = PlainNetwork("start", network, activation, ACTIVATIONS)
        updates.check_loss(loss)
        self.rate = updates.rate_of(optimizer)
        self.optimizer, self.network, self.activation, self.loss = optimizer, self._net.network, activation, loss

    def on(self, shape: tuple[int, ...], outputs: int) -> Self:
        made = copy.copy(self)
        made._net = self._net.on(shape, outputs)
        return made

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> BaselineState:
        return self.begin(self._net.init(features, outputs, seed, leading, shard))

    def begin(self, weights: tuple[Array, ...]) -> BaselineState:
        """The state of an untrained network with the given weights."""
        zeros = tuple(ops.zeros_like(weight) for weight in weights)
        return BaselineState(weights, zeros, zeros, ops.zeros((), "int32"))

    def check(self, kind: str, outputs: int) -> None:
        """Raises a `ValueError` if the loss does not fit tasks of this kind."""
        updates.check_loss(self.loss, kind)

    def gradients(self, weights: tuple[Array, ...], x: Array, y: Array) -> tuple[tuple[Array, ...], Array]:
        """The gradient of the batch loss with respect to the weights, and the prediction."""

        def loss(weights: tuple[Array, ...]) -> tuple[Array, Array]:
            prediction = self._net(weights, x)
            # The mean over a batch; the sum over leading axes leaves each network its own gradient.
            loss = ops.sum(backend.mean(updates.losses(self.loss, prediction, y), -1))
            return loss + self._net.penalty(weights), prediction

        prediction, gradients = backend.gradient(loss, weights)
        return gradients, prediction

    def step(self, outer: Outer, state: BaselineState, x: Array, y: Array) -> tuple[BaselineState, Array]:
        gradients, prediction = self.gradients(state.weights, x, y)
        rate = ops.cast(ops.convert_to_tensor(outer.get("learning_rate", self.rate)), prediction.dtype)
        moments = (state.weights, state.first, state.second, gradients)
        leading = len(prediction.shape) - 2
        weights, first, second = updates.updated(self.optimizer, rate, state.step, *moments, leading=leading)
        return BaselineState(self._net.limited(weights), first, second, state.step + 1), prediction

    def predict(self, outer: Outer, state: BaselineState, x: Array) -> Array:
        return self._net(state.weights, x)
