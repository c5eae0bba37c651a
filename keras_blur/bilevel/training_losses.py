"""Training losses with outer parameters, which `BilevelTrainer` learns along with a model.

Sources: example weights as a function of the loss, "Meta-Weight-Net" (Shu et al., NeurIPS 2019), as
used by "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR 2021); a
learned rotation of training images, "EvoGrad" (Bohdal et al., NeurIPS 2021).

Each is a Keras model whose trainable weights are the outer parameters, with a method
`training_loss` written as ordinary Keras code. The trainer calls it in a scope where variables have
the values chosen by the estimator. To add a training loss, write a subclass with this method.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import mean, total
from keras_blur.core.losses import ExampleLosses, check_weighable
from keras_blur.distribution import shard

Array = Any

# What `held` does with a value; `None` outside of the scopes below.
_HOLD: contextvars.ContextVar[Callable[[Array], Array] | None] = contextvars.ContextVar("_HOLD", default=None)


def held(value: Array) -> Array:
    """A value that a training loss takes as a constant, whatever it depends on.

    In a training loss, use it in place of `keras.ops.stop_gradient`. `FiniteDifference` computes
    the loss at moved weights, where the value has to stay that of the weights themselves.

    Args:
        value: an array.

    Example:

    >>> float(held(ops.convert_to_tensor(2.0)))
    2.0
    """
    hold, value = _HOLD.get(), ops.stop_gradient(value)
    return value if hold is None else hold(value)


@contextlib.contextmanager
def recording(found: list[Array]) -> Iterator[None]:
    """A scope that appends to `found` what is `held`."""

    def record(value: Array) -> Array:
        found.append(value)
        return value

    with _holding(record):
        yield


@contextlib.contextmanager
def replaying(found: list[Array]) -> Iterator[None]:
    """A scope in which `held` gives the values of `found` in turn."""
    values = iter(found)
    with _holding(lambda value: next(values)):
        yield


@contextlib.contextmanager
def _holding(hold: Callable[[Array], Array]) -> Iterator[None]:
    before = _HOLD.set(hold)
    try:
        yield
    finally:
        _HOLD.reset(before)


class TrainingLoss(keras.Model):
    """A training loss whose outer parameters are the trainable weights of this model.

    Args:
        name: name of the model; `None` for a name by Keras.
    """

    def __init__(self, name: str | None = None):
        super().__init__(name=name)
        self.built, self.autocast = True, False  # the layers that it has cast their own inputs

    def training_loss(self, model: keras.Model, x: Array, y: Array, losses: ExampleLosses) -> Array:
        """Computes the loss of a batch.

        Args:
            model: the model to train. Call it with `training=True`. What depends on it and is to
                be a constant goes through `held`.
            x, y: the batch.
            losses: maps labels and predictions to the loss of each example, `[batch]`. Their mean
                is the loss of Keras's `fit`.

        Returns:
            A scalar.
        """
        return mean(losses(y, model(x, training=True)))

    def read(self) -> dict[str, Array]:
        """Scalars to log, computed from the current outer parameters."""
        return {}

    def call(self, inputs: Array) -> Array:
        return inputs


@keras.saving.register_keras_serializable(package="keras_blur")
class SampleWeightNet(TrainingLoss):
    """Meta-Weight-Net: a small network that maps the loss of an example to its weight in [0, 1].

    The loss is taken as a constant, so the model cannot learn to influence its weights. Weights are
    divided by their sum in the batch. This leaves the scale of the network free, and a large outer
    learning rate can drive all weights to 1, which disables the method. All weights start at 1/2,
    which is the plain mean. With a random start, half of the networks would prefer large losses,
    and some would saturate before the meta data have an effect.

    Args:
        hidden: units of the hidden layer.
        seed: random seed of the hidden layer.
        name: name of the model; `None` for a name by Keras.

    Raises:
        ValueError: if `hidden` or `seed` is out of range.

    Example:

    >>> net = SampleWeightNet(hidden=20)
    >>> tuple(net(np.array([0.1, 2.0], "float32")).shape)
    (2,)
    """

    def __init__(self, hidden: int = 100, seed: int = 0, name: str | None = None):
        arguments.count("hidden", hidden)
        arguments.integer("seed", seed, 0)
        super().__init__(name=name)
        self.hidden, self.seed = hidden, seed
        self.first = keras.layers.Dense(hidden, "relu", kernel_initializer=keras.initializers.HeNormal(seed))
        self.second = keras.layers.Dense(1, "sigmoid", kernel_initializer="zeros")
        self.first.build((None, 1))
        self.second.build((None, hidden))

    def call(self, inputs: Array) -> Array:
        """Maps losses `[batch]` to weights `[batch]`."""
        return self.second(self.first(ops.expand_dims(inputs, -1)))[:, 0]

    def training_loss(self, model: keras.Model, x: Array, y: Array, losses: ExampleLosses) -> Array:
        each = losses(y, model(x, training=True))
        check_weighable(each)
        weights = ops.cast(self(held(each)), each.dtype)
        # Over replicas the sum is that of the whole batch, and has a derivative; each has its part
        # of a mean.
        replicas = shard().count
        whole = total([ops.sum(weights)])[0] if replicas > 1 else ops.sum(weights)
        return replicas * ops.sum(weights * each) / ops.maximum(whole, 1e-8)

    def get_config(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "seed": self.seed, "name": self.name}


@keras.saving.register_keras_serializable(package="keras_blur")
class LearnedRotation(TrainingLoss):
    """Rotates training images by a learned angle.

    Args:
        degrees: initial angle, counterclockwise.
        name: name of the model; `None` for a name by Keras.

    Raises:
        ValueError: if `degrees` is not a finite number.

    Example:

    >>> turn = LearnedRotation(90.0)
    >>> turned = turn(np.eye(3, dtype="float32")[None, :, :, None])
    >>> ops.convert_to_numpy(turned)[0, :, :, 0].round(3).tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """

    def __init__(self, degrees: float = 0.0, name: str | None = None):
        arguments.real("degrees", degrees)
        super().__init__(name=name)
        self.degrees = degrees
        start = keras.initializers.Constant(math.radians(degrees))
        self.angle = self.add_weight(name="angle", shape=(), initializer=start)

    def call(self, inputs: Array) -> Array:
        """Rotates images `[batch, height, width, channels]` around their centre, with zero fill."""
        return rotated(inputs, self.angle)

    def training_loss(self, model: keras.Model, x: Array, y: Array, losses: ExampleLosses) -> Array:
        return mean(losses(y, model(self(x), training=True)))

    def read(self) -> dict[str, Array]:
        return {"degrees": ops.convert_to_tensor(self.angle) * (180.0 / math.pi)}

    def get_config(self) -> dict[str, Any]:
        return {"degrees": self.degrees, "name": self.name}


@keras.saving.register_keras_serializable(package="keras_blur")
class Hyperparameters(TrainingLoss):
    """Scalar hyperparameters of a training loss. The given ones are learned, starting there.

    Args:
        weight_decay: factor of half the sum of squares of the model's kernels, above 0.
        label_smoothing: fraction of a label that is distributed evenly over all classes, between 0
            and 1. Labels are integers or one-hot.
        class_weights: number of classes. The weight of each class is learned. Weights start at 1
            and average 1. Labels have shape (batch,), (batch, 1) or (batch, classes).
        name: name of the model; `None` for a name by Keras.

    Raises:
        ValueError: if no argument is given or one is out of range.

    Example:

    >>> {name: round(float(value), 4) for name, value in Hyperparameters(weight_decay=1e-3).read().items()}
    {'weight_decay': 0.001}
    """

    def __init__(
        self,
        weight_decay: float | None = None,
        label_smoothing: float | None = None,
        class_weights: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        if weight_decay is None and label_smoothing is None and class_weights is None:
            raise ValueError("One of `weight_decay`, `label_smoothing` and `class_weights` must be given. Received none.")
        if weight_decay is not None:
            arguments.positive("weight_decay", weight_decay)
        if label_smoothing is not None:
            arguments.between("label_smoothing", label_smoothing, 0.0, 1.0)
        if class_weights is not None:
            arguments.count("class_weights", class_weights)
        self.given = {"weight_decay": weight_decay, "label_smoothing": label_smoothing, "class_weights": class_weights}
        if weight_decay is not None:
            start = keras.initializers.Constant(math.log(weight_decay))
            self.log_decay = self.add_weight(name="log_decay", shape=(), initializer=start)
        if label_smoothing is not None:
            start = keras.initializers.Constant(math.log(label_smoothing / (1.0 - label_smoothing)))
            self.smoothing_logit = self.add_weight(name="smoothing_logit", shape=(), initializer=start)
        if class_weights is not None:
            self.class_logits = self.add_weight(name="class_logits", shape=(class_weights,), initializer="zeros")

    def training_loss(self, model: keras.Model, x: Array, y: Array, losses: ExampleLosses) -> Array:
        prediction = model(x, training=True)
        if self.given["label_smoothing"] is None:
            each = losses(y, prediction)
        else:
            each = losses.smoothed(y, prediction, ops.sigmoid(self.smoothing_logit))
        if self.given["class_weights"] is not None:
            check_weighable(each)
            each = each * ops.cast(self._weights_of(y, prediction), each.dtype)
        loss = mean(each)
        if self.given["weight_decay"] is not None:
            kernels = [v for v in model.trainable_variables if len(v.shape) > 1]
            squares = sum(ops.cast(ops.sum(ops.square(v)), loss.dtype) for v in kernels)
            loss = loss + 0.5 * ops.cast(ops.exp(self.log_decay), loss.dtype) * squares
        return loss

    def _weights_of(self, y: Array, prediction: Array) -> Array:
        """The weight of each example, `[batch]`.

        Labels have shape `[batch]`, `[batch, 1]` or `[batch, classes]`.
        """
        count, columns = int(self.class_logits.shape[0]), prediction.shape[-1]
        if count != max(2, columns):
            raise ValueError(
                f"`class_weights` must be the number of classes, {max(2, columns)}, as the model has {columns} output(s). "
                f"Received: class_weights={count}"
            )
        weights = self._weights_of_classes()
        if len(y.shape) == len(prediction.shape) == 2 and y.shape[-1] == columns > 1:
            return ops.matmul(ops.relu(ops.cast(y, weights.dtype)), weights[:, None])[:, 0]
        if len(y.shape) == 2 and y.shape[-1] == 1:
            y = y[:, 0]
        if len(y.shape) != 1:
            raise ValueError(
                "`class_weights` must go with labels of shape (batch,), (batch, 1) or (batch, classes). Received: labels of "
                f"shape {tuple(y.shape)}"
            )
        if columns == 1 and "float" in keras.backend.standardize_dtype(y.dtype):  # may lie between the two classes
            return weights[0] + ops.clip(ops.cast(y, weights.dtype), 0.0, 1.0) * (weights[1] - weights[0])
        return ops.take(weights, ops.clip(ops.cast(y, "int32"), 0, count - 1))  # an ignored label may lie outside

    def _weights_of_classes(self) -> Array:
        return self.given["class_weights"] * ops.softmax(self.class_logits)

    def read(self) -> dict[str, Array]:
        found = {}
        if self.given["weight_decay"] is not None:
            found["weight_decay"] = ops.exp(self.log_decay)
        if self.given["label_smoothing"] is not None:
            found["label_smoothing"] = ops.sigmoid(self.smoothing_logit)
        if self.given["class_weights"] is not None:
            found["largest_class_weight"] = ops.max(self._weights_of_classes())
        return found

    def get_config(self) -> dict[str, Any]:
        return {**self.given, "name": self.name}


def rotated(images: Array, angle: Array) -> Array:
    """Rotates images counterclockwise by bilinear interpolation, differentiable in the angle.

    Args:
        images: images `[batch, height, width, channels]`, of any numeric dtype.
        angle: angle in radians, a scalar.

    Returns:
        Floating-point images of the same shape, with zeros where a pixel comes from outside.
    """
    given = keras.backend.standardize_dtype(images.dtype)
    exact = given if given == "float64" else "float32"  # half precision has too few digits for places of pixels
    images = ops.cast(images, exact)
    height, width = images.shape[1:3]
    rows, columns = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    angle = ops.cast(angle, images.dtype)
    cosine, sine = ops.cos(angle), ops.sin(angle)
    rows, columns = (ops.convert_to_tensor(one.reshape(-1), images.dtype) for one in (rows, columns))
    # Where each pixel comes from: rows run downwards, so a counterclockwise turn has the sine with
    # this sign.
    row = cosine * rows + sine * columns + (height - 1) / 2
    column = cosine * columns - sine * rows + (width - 1) / 2
    flat = ops.reshape(images, (-1, height * width, images.shape[3]))
    top, left = ops.stop_gradient(ops.floor(row)), ops.stop_gradient(ops.floor(column))
    result = ops.zeros_like(flat)
    for down in (0.0, 1.0):
        for right in (0.0, 1.0):
            r, c = top + down, left + right
            inside = (r >= 0) & (r <= height - 1) & (c >= 0) & (c <= width - 1)
            part = (1.0 - ops.abs(row - r)) * (1.0 - ops.abs(column - c)) * ops.cast(inside, images.dtype)
            place = ops.clip(r, 0, height - 1) * width + ops.clip(c, 0, width - 1)
            result = result + part[None, :, None] * ops.take(flat, ops.cast(place, "int32"), axis=1)
    return ops.cast(ops.reshape(result, (-1, height, width, images.shape[3])), given if "float" in given else exact)
