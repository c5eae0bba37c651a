"""MAML: initial weights from which a few optimizer steps learn any of the tasks.

Source: "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (Finn, Abbeel and
Levine, ICML 2017), algorithm 1. The support gives theta' = theta - alpha grad L(theta). The outer
gradient is that of the query loss of theta' with respect to theta. The exact gradient
differentiates through the inner gradients. The first-order variant takes them as constants, which
needs less time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer
from keras_blur.learners.baseline import BaselineLearner, BaselineState

_NAME = "start"


class MAML(BaselineLearner, MetaLearner):
    """A dense network with learned initial weights, trained by a Keras optimizer.

    Args:
        optimizer: as in `learners.BaselineLearner`. The paper uses plain SGD.
        hidden: units of the hidden layers.
        activation: hidden activation.
        loss: loss of the inner steps, as in `learners.BaselineLearner`.
        first_order: whether the outer gradient takes inner gradients as constants.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> learner = MAML(keras.optimizers.SGD(0.1), hidden=(32,), loss="squared")
    >>> sorted(learner.draw(0, 1, features=1, outputs=1))
    ['start_bias_0', 'start_bias_1', 'start_kernel_0', 'start_kernel_1']
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        hidden: tuple[int, ...] = (40, 40),
        activation: str = "relu",
        *,
        loss: str = "cross_entropy",
        first_order: bool = False,
    ):
        super().__init__(optimizer, hidden, activation, loss=loss)
        dense.check(activation)  # what is learned is to be a Keras model
        arguments.flag("first_order", first_order)
        self.first_order = first_order

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        return dense.draw(_NAME, (features, *self.hidden, outputs), self.activation, members, [seed, 0])

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        return dense.sequential(_NAME, outer, self.activation)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        return dense.read(learned, _NAME)

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> BaselineState:
        weights = dense.weights(_NAME, outer)
        return self.begin(tuple(ops.broadcast_to(one, (*leading, *one.shape[-2:])) for one in weights))

    def adapted(self, state: BaselineState) -> dict[str, Array]:
        names = [f"{_NAME}_{kind}_{index}" for index in range(len(state.weights) // 2) for kind in ("kernel", "bias")]
        return dict(zip(names, state.weights, strict=True))

    def gradients(self, weights: tuple[Array, ...], x: Array, y: Array) -> tuple[tuple[Array, ...], Array]:
        gradients, prediction = super().gradients(weights, x, y)
        return tuple(map(ops.stop_gradient, gradients)) if self.first_order else gradients, prediction
