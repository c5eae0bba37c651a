"""The baseline: a dense network trained by a Keras optimizer.

It has the same interface, batches and initial networks as the other learners, so a comparison only
compares the rules.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
from keras import ops

from keras_blur import backend
from keras_blur.core.rule import ACTIVATIONS
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense, updates
from keras_blur.learners.base import Array, Learner, Outer, draw_kernel


class BaselineState(NamedTuple):
    """Kernels and biases by layer, two moment arrays for each, and the step number."""

    weights: tuple[Array, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]
    step: Array


class BaselineLearner(Learner):
    """A dense network trained by a Keras optimizer.

    Args:
        optimizer: a Keras SGD (with or without momentum), Adam or RMSprop. Only its rates and
            coefficients may be set.
        hidden: units of the hidden layers.
        activation: hidden activation, one known to `Rule`.
        loss: training loss: `"cross_entropy"` (softmax, or logistic for a single output) or
            `"squared"` (mean squared error).

    Raises:
        ValueError: if the optimizer is not supported or an argument is out of range.

    Example:

    >>> BaselineLearner(keras.optimizers.SGD(0.1), hidden=(32,)).hidden
    (32,)
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        hidden: tuple[int, ...] = (128,),
        activation: str = "tanh",
        *,
        loss: str = "cross_entropy",
    ):
        updates.check_optimizer(optimizer)
        dense.check(activation, ACTIVATIONS, hidden=hidden)
        updates.check_loss(loss)
        self.rate = updates.rate_of(optimizer)
        self.optimizer, self.hidden, self.activation, self.loss = optimizer, tuple(hidden), activation, loss

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> BaselineState:
        weights: list[Array] = []
        before = features
        for index, units in enumerate((*self.hidden, outputs)):
            weights.append(draw_kernel(seed, (index, 0, 0), (before, units), leading, shard))
            weights.append(ops.zeros((*leading, 1, units), "float32"))
            before = units
        return self.begin(tuple(weights))

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
            prediction = dense.forward(weights, x, self.activation)
            # The mean over a batch; the sum over leading axes leaves each network its own gradient.
            return ops.sum(backend.mean(updates.losses(self.loss, prediction, y), -1)), prediction

        prediction, gradients = backend.gradient(loss, weights)
        return gradients, prediction

    def step(self, outer: Outer, state: BaselineState, x: Array, y: Array) -> tuple[BaselineState, Array]:
        gradients, prediction = self.gradients(state.weights, x, y)
        rate = ops.cast(ops.convert_to_tensor(outer.get("learning_rate", self.rate)), prediction.dtype)
        moments = (state.weights, state.first, state.second, gradients)
        leading = len(prediction.shape) - 2
        arrays = updates.updated(self.optimizer, rate[..., None, None], state.step, *moments, leading=leading)
        return BaselineState(*arrays, state.step + 1), prediction

    def predict(self, outer: Outer, state: BaselineState, x: Array) -> Array:
        return dense.forward(state.weights, x, self.activation)
