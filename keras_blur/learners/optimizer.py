"""The baseline: a plain network that learns by a Keras optimizer on the softmax cross-entropy.

It has the interface, the batches and the initial networks of the other learners, so that a comparison compares the rules and
nothing else. On TensorFlow, Keras's optimizers have no functional face (`stateless_apply` raises), so the update of each is
written here as a function of arrays, with the hyperparameters read from the Keras object; tests hold it to Keras's own
numbers. As functions they also run a whole grid of rates at once, on a leading axis.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_blur import rule as equations
from keras_blur.distribution import ALL, Share
from keras_blur.learners.base import Array, Learner, Outer, draw_kernel
from keras_blur.options import ACTIVATIONS


class OptimizerState(NamedTuple):
    """Kernels and biases by layer; two arrays of moments for each; the number of steps."""

    weights: tuple[Array, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]
    step: Array


class Optimizer(Learner):
    """A dense network under a Keras optimizer.

    Args:
        optimizer: a Keras SGD (with momentum or without), Adam or RMSprop, without options beyond its rates.
        hidden: units of the hidden layers.
        activation: their nonlinearity, a name that a `Rule` knows.

    Raises:
        ValueError: if the optimizer is not one of these.

    Example:

    >>> Optimizer(keras.optimizers.SGD(0.1), hidden=(32,)).hidden
    (32,)
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, hidden: tuple[int, ...] = (128,), activation: str = "tanh"):
        kind = type(optimizer)
        extras = ("clipnorm", "clipvalue", "global_clipnorm", "weight_decay", "use_ema", "amsgrad", "nesterov", "centered",
                  "gradient_accumulation_steps", "loss_scale_factor")  # fmt: skip
        used = [name for name in extras if getattr(optimizer, name, None)]
        if isinstance(getattr(optimizer, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule):
            used.append("a learning-rate schedule")
        plain = not (kind is keras.optimizers.RMSprop and optimizer.momentum)
        if kind not in (keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.RMSprop) or used or not plain:
            raise ValueError(
                f"`optimizer` must be a Keras SGD, Adam or RMSprop with none of {', '.join(extras)} (nor momentum for "
                f"RMSprop). Received: {kind.__name__} with {', '.join(used) or 'other options'}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {', '.join(map(repr, ACTIVATIONS))}. Received: {activation!r}")
        if any(units < 1 for units in hidden):
            raise ValueError(f"`hidden` must be positive integers. Received: hidden={hidden!r}")
        self.optimizer, self.hidden, self.activation = optimizer, tuple(hidden), activation

    def init(
        self, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), share: Share = ALL
    ) -> OptimizerState:
        if outputs < 2:
            raise ValueError(f"`outputs` must be at least 2, a class each. Received: outputs={outputs!r}")
        weights: list[Array] = []
        before = features
        for index, units in enumerate((*self.hidden, outputs)):
            weights.append(draw_kernel(seed, (index, 0, 0), (before, units), leading, share))
            weights.append(tf.zeros((*leading, 1, units)))
            before = units
        zeros = tuple(tf.zeros_like(weight) for weight in weights)
        return OptimizerState(tuple(weights), zeros, zeros, tf.zeros((), tf.int32))

    def _forward(self, weights: tuple[Array, ...], x: Array) -> Array:
        for index in range(0, len(weights), 2):
            x = tf.matmul(x, weights[index]) + weights[index + 1]
            if index < len(weights) - 2:
                x = equations.activate(self.activation, x)
        return x

    def step(self, outer: Outer, state: OptimizerState, x: Array, y: Array) -> tuple[OptimizerState, Array]:
        with tf.GradientTape() as tape:
            tape.watch(state.weights)
            prediction = self._forward(state.weights, x)
            labels = tf.broadcast_to(0.5 * (y + 1.0), tf.shape(prediction))
            losses = tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=prediction)
            # The mean over a batch; the sum over leading axes leaves each network its own gradient.
            loss = tf.reduce_sum(tf.reduce_mean(losses, axis=-1))
        gradients = tape.gradient(loss, state.weights)
        rate = tf.convert_to_tensor(outer.get("learning_rate", self.optimizer.learning_rate), loss.dtype)
        rate = rate[..., None, None]
        columns = zip(state.weights, state.first, state.second, gradients, strict=True)
        updated = [self._update(rate, state.step, *column) for column in columns]
        weights, first, second = (tuple(part) for part in zip(*updated, strict=True))
        return OptimizerState(weights, first, second, state.step + 1), prediction

    def _update(
        self, rate: Array, step: Array, weight: Array, first: Array, second: Array, gradient: Array
    ) -> tuple[Array, Array, Array]:
        """One weight array and its moments after one step, as Keras's optimizers define it."""
        o = self.optimizer
        if isinstance(o, keras.optimizers.SGD):
            if not o.momentum:
                return weight - rate * gradient, first, second
            first = o.momentum * first - rate * gradient
            return weight + first, first, second
        if isinstance(o, keras.optimizers.RMSprop):
            second = o.rho * second + (1.0 - o.rho) * tf.square(gradient)
            return weight - rate * gradient * tf.math.rsqrt(second + o.epsilon), first, second
        time = tf.cast(step + 1, weight.dtype)
        scale = tf.sqrt(1.0 - tf.pow(o.beta_2, time)) / (1.0 - tf.pow(o.beta_1, time))
        first = first + (1.0 - o.beta_1) * (gradient - first)
        second = second + (1.0 - o.beta_2) * (tf.square(gradient) - second)
        return weight - rate * scale * first / (tf.sqrt(second) + o.epsilon), first, second

    def predict(self, outer: Outer, state: OptimizerState, x: Array) -> Array:
        return self._forward(state.weights, x)
