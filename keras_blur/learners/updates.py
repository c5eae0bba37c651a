"""Updates of Keras optimizers as pure functions, and the losses of the inner loop.

On TensorFlow, Keras optimizers have no functional interface (`stateless_apply` raises). The updates
are therefore written here, with hyperparameters read from the Keras object. Tests compare them with
Keras. Pure functions can also run a grid of learning rates on a leading axis, and can be
differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_blur import arguments, backend

Array = Any

LOSSES = {"cross_entropy": "classes", "squared": "values"}  # and the kind of tasks that each is for
_EXTRAS = ("clipnorm", "clipvalue", "weight_decay", "use_ema", "amsgrad", "nesterov", "centered",
           "gradient_accumulation_steps", "loss_scale_factor")  # fmt: skip


def check_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises a `ValueError` if an optimizer is not supported here."""
    kind = type(optimizer)
    used = [name for name in _EXTRAS if getattr(optimizer, name, None)]
    if isinstance(getattr(optimizer, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule):
        used.append("a learning-rate schedule")
    plain = not (kind is keras.optimizers.RMSprop and optimizer.momentum)
    if kind not in (keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.RMSprop) or used or not plain:
        raise ValueError(
            f"`optimizer` must be a Keras SGD, Adam or RMSprop with none of {', '.join(_EXTRAS)} (nor momentum for "
            f"RMSprop). Received: {kind.__name__} with {', '.join(used) or 'other options'}"
        )


def rate_of(optimizer: keras.optimizers.Optimizer) -> float:
    """The learning rate as a number.

    Keras stores it in a variable, which a pure function cannot read.
    """
    return float(backend.numbers_of(optimizer.learning_rate))


def check_loss(loss: str, kind: str | None = None) -> None:
    """Raises a `ValueError` if a loss is unknown or does not fit tasks of this kind."""
    arguments.choice("loss", loss, tuple(LOSSES))
    if kind is not None and kind not in LOSSES.values():
        raise ValueError(f"`tasks` of this learner must be of classes or values. Received: tasks of {kind}")
    if kind is not None and LOSSES[loss] != kind:
        wanted = next(one for one, of in LOSSES.items() if of == kind)
        raise ValueError(f"`loss` of the learner must be {wanted!r} for tasks of {kind}. Received: loss={loss!r}")


def losses(loss: str, prediction: Array, y: Array) -> Array:
    """The loss of each example, `[..., batch]`, of logits and +1/-1 labels or of values.

    The cross-entropy of a single logit is the logistic one.
    """
    y = ops.broadcast_to(y, ops.shape(prediction))
    if loss == "squared":
        return backend.mean(ops.square(prediction - y), -1)
    if prediction.shape[-1] == 1:
        return ops.softplus(-prediction * y)[..., 0]
    return ops.categorical_crossentropy(0.5 * (y + 1.0), prediction, from_logits=True)


def updated(
    optimizer: keras.optimizers.Optimizer,
    rate: Array,
    step: Array,
    weights: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
    gradients: Sequence[Array],
    leading: int = 0,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """Weights and moments after one optimizer step.

    Args:
        optimizer: a Keras optimizer. Everything but the learning rate is read from it.
        rate: the learning rate, whose axes broadcast with the leading ones.
        step: number of steps so far.
        weights, first, second, gradients: arrays with the same leading axes, one network per
            position.
        leading: number of leading axes.
    """
    if optimizer.global_clipnorm:
        squares = [ops.sum(ops.square(g), axis=tuple(range(leading, len(g.shape)))) for g in gradients]
        scale = optimizer.global_clipnorm / ops.maximum(root(sum(squares)), optimizer.global_clipnorm)
        gradients = [g * ops.reshape(scale, (*scale.shape, *[1] * (len(g.shape) - leading))) for g in gradients]
    columns = zip(weights, first, second, gradients, strict=True)
    weights, first, second = (
        tuple(part)
        for part in zip(*(_update(optimizer, _behind(rate, c[0], leading), step, *c) for c in columns), strict=True)
    )
    return weights, first, second


def _behind(rate: Array, weight: Array, leading: int) -> Array:
    """A rate with an axis of size 1 for each own axis of a weight."""
    return ops.reshape(rate, (*ops.shape(rate), *[1] * (len(weight.shape) - leading)))


def _update(
    o: keras.optimizers.Optimizer, rate: Array, step: Array, weight: Array, first: Array, second: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """One weight array and its moments after one step, as defined by the Keras optimizer."""
    if isinstance(o, keras.optimizers.SGD):
        if not o.momentum:
            return weight - rate * gradient, first, second
        first = o.momentum * first - rate * gradient
        return weight + first, first, second
    if isinstance(o, keras.optimizers.RMSprop):
        second = o.rho * second + (1.0 - o.rho) * ops.square(gradient)
        return weight - rate * gradient * ops.rsqrt(second + o.epsilon), first, second
    time = ops.cast(step + 1, weight.dtype)
    fading = [beta**time for beta in (o.beta_1, o.beta_2)]
    scale = ops.sqrt(1.0 - fading[1]) / (1.0 - fading[0])
    first = first + (1.0 - o.beta_1) * (gradient - first)
    second = second + (1.0 - o.beta_2) * (ops.square(gradient) - second)
    return weight - rate * scale * first / (root(second) + o.epsilon), first, second


def root(value: Array) -> Array:
    """The square root, with a derivative of 0 at 0.

    The derivative of `ops.sqrt` at 0 is infinite, and infinity times 0 is NaN. Some kernels hide
    this, but under XLA a single weight without a gradient would make every meta-gradient NaN.

    Args:
        value: non-negative numbers.

    Example:

    >>> ops.convert_to_numpy(root(ops.array([0.0, 4.0]))).tolist()
    [0.0, 2.0]
    """
    zero = ops.equal(value, 0)  # NaN stays NaN
    return ops.where(zero, ops.zeros_like(value), ops.sqrt(ops.where(zero, ops.ones_like(value), value)))
