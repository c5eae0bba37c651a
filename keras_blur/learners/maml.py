"""MAML: initial weights from which a few optimizer steps learn any of the tasks.

Source: "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (Finn, Abbeel and
Levine, ICML 2017), algorithm 1. The support gives theta' = theta - alpha grad L(theta). The outer
gradient is that of the query loss of theta' with respect to theta. The exact gradient
differentiates through the inner gradients. The first-order variant takes them as constants, which
needs less time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense
from keras_blur.learners.base import Array, MetaLearner, Outer
from keras_blur.learners.baseline import BaselineLearner, BaselineState
from keras_blur.learners.networks import Network


class MAML(BaselineLearner, MetaLearner):
    """A network with learned initial weights, trained by a Keras optimizer.

    Args:
        optimizer: as in `learners.BaselineLearner`. The paper uses plain SGD.
        network: units of the hidden layers of a dense network; or a function from the shape of an
            example and the number of outputs to a list of Keras layers, or to a Keras model, as in
            `learners.Blur`. Kernels are drawn with variance 1 / fan-in, or 2 / fan-in
            if `activation` is a relu. Batch normalisation uses the statistics of the batch at
            hand, in predictions too: those of the query are its own.
        activation: hidden activation of a dense network, and of layers of `keras_blur` that
            have none.
        loss: loss of the inner steps, as in `learners.BaselineLearner`.
        first_order: whether the outer gradient treats inner gradients as constants.

    Raises:
        ValueError: if an argument is out of range; from `draw`, if a layer of the network is
            frozen.

    Example:

    >>> learner = MAML(keras.optimizers.SGD(0.1), network=(32,), loss="squared")
    >>> sorted(learner.draw(0, 1, features=1, outputs=1))
    ['start_bias_0', 'start_bias_1', 'start_kernel_0', 'start_kernel_1']
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        network: Sequence[int] | Network = (40, 40),
        activation: str = "relu",
        *,
        loss: str = "cross_entropy",
        first_order: bool = False,
    ):
        super().__init__(optimizer, network, activation, loss=loss)
        arguments.choice("activation", activation, dense.KERAS_ACTIVATIONS)  # what is learned is to be a Keras model
        arguments.flag("first_order", first_order)
        self.first_order = first_order

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        return self._net.draw(features, outputs, members, [seed, 0])

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        return self._net.model(outer)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        return self._net.read(learned)

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> BaselineState:
        return self.begin(self._net.spread(self._net.arrays(outer), leading))

    def adapted(self, state: BaselineState) -> dict[str, Array]:
        return self._net.named(state.weights)

    def gradients(self, weights: tuple[Array, ...], x: Array, y: Array) -> tuple[tuple[Array, ...], Array]:
        gradients, prediction = super().gradients(weights, x, y)
        return tuple(map(ops.stop_gradient, gradients)) if self.first_order else gradients, prediction
