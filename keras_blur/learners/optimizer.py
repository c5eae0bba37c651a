"""The baseline: a plain network that learns by a Keras optimizer, as most do.

It has the interface, the batches and the initial networks of the other learners, so that a comparison compares the rules and
nothing else. On TensorFlow, Keras's optimizers have no functional face (`stateless_apply` raises), so the update of each is
written here as a function of arrays, with the hyperparameters read from the Keras object; tests hold it to Keras's own
numbers. As functions they also run a whole grid of rates at once, on a leading axis.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_blur.distribution import ALL, Share
from keras_blur.learners import dense
from keras_blur.learners.base import Array, Learner, Outer, draw_kernel

LOSSES = {"cross_entropy": "classes", "squared": "values"}  # and the kind of tasks that each is for


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
        loss: what it descends: `"cross_entropy"`, the softmax's, or `"squared"`, the mean squared error.

    Raises:
        ValueError: if the optimizer is not one of these, or an argument is out of range.

    Example:

    >>> Optimizer(keras.optimizers.SGD(0.1), hidden=(32,)).hidden
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
        dense.check(activation, hidden=hidden)
        if loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(map(repr, LOSSES))}. Received: loss={loss!r}")
        self.optimizer, self.hidden, self.activation, self.loss = optimizer, tuple(hidden), activation, loss

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), share: Share = ALL
    ) -> OptimizerState:
        if outputs < 2 and self.loss == "cross_entropy":
            raise ValueError(f"`outputs` must be at least 2, a class each. Received: outputs={outputs!r}")
        weights: list[Array] = []
        before = features
        for index, units in enumerate((*self.hidden, outputs)):
            weights.append(draw_kernel(seed, (index, 0, 0), (before, units), leading, share))
            weights.append(tf.zeros((*leading, 1, units)))
            before = units
        return self.begin(tuple(weights))

    def begin(self, weights: tuple[Array, ...]) -> OptimizerState:
        """The state of a network that has not yet learned."""
        zeros = tuple(tf.zeros_like(weight) for weight in weights)
        return OptimizerState(weights, zeros, zeros, tf.zeros((), tf.int32))

    def check(self, kind: str, outputs: int) -> None:
        """Raises a `ValueError` if the loss is not for tasks of this kind."""
        if LOSSES[self.loss] != kind:
            wanted = next(loss for loss, of in LOSSES.items() if of == kind)
            raise ValueError(f"`loss` of the learner must be {wanted!r} for tasks of {kind}. Received: loss={self.loss!r}")

    def gradients(self, weights: tuple[Array, ...], x: Array, y: Array) -> tuple[tuple[Array, ...], Array]:
        """The gradient of the loss on a batch by the weights, and the prediction."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            prediction = dense.forward(weights, x, self.activation)
            y = tf.broadcast_to(y, tf.shape(prediction))
            if self.loss == "squared":
                losses = tf.reduce_mean(tf.square(prediction - y), axis=-1)
            else:
                losses = tf.nn.softmax_cross_entropy_with_logits(labels=0.5 * (y + 1.0), logits=prediction)
            # The mean over a batch; the sum over leading axes leaves each network its own gradient.
            loss = tf.reduce_sum(tf.reduce_mean(losses, axis=-1))
        return tape.gradient(loss, weights), prediction

    def step(self, outer: Outer, state: OptimizerState, x: Array, y: Array) -> tuple[OptimizerState, Array]:
        gradients, prediction = self.gradients(state.weights, x, y)
        rate = tf.cast(tf.convert_to_tensor(outer.get("learning_rate", self.optimizer.learning_rate)), prediction.dtype)
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
        return dense.forward(state.weights, x, self.activation)
