"""Keras losses as Keras's `fit` applies them: functions and objects, label ranks, masks, dtypes and
reductions.

Source: `keras.losses.Loss.__call__` and `keras.Model.compile` of Keras 3. A loss is taken apart
only here. The mean of the losses that `per_example` returns is the number that `fit` minimises.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_blur.backend import mean, replicas

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any
SUMS = (None, "none", "sum")  # `fit` descends the sum of a loss without a reduction
FunctionLoss: Any = keras.losses.MeanSquaredError.__base__  # Keras does not export LossFunctionWrapper


def as_keras(loss: Any) -> keras.losses.Loss:
    """The `keras.losses.Loss` that `keras.Model.compile` makes from its argument.

    Args:
        loss: a `Loss`, a class of one, its config, a name, or a function of labels and predictions.

    Raises:
        ValueError: if it is none of these, or a `Loss` with a `__call__` of its own.

    Example:

    >>> as_keras("mae").name
    'mean_absolute_error'
    """
    wrong = f"`loss` must be a keras.losses.Loss or its name, or a function of labels and predictions. Received: {loss!r}"
    try:
        found = keras.losses.get(loss)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(wrong) from error
    if isinstance(found, keras.losses.Loss):
        if type(found).__call__ is not keras.losses.Loss.__call__:
            raise ValueError(f"`loss` must be a Loss with a `call`, not a `__call__`, of its own. Received: {loss!r}")
        return found
    if not callable(found) or not _takes_two(found):
        raise ValueError(wrong)
    name = getattr(found, "__name__", "loss")
    return FunctionLoss(found, name=name if name.isidentifier() else "loss")


def _takes_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind(0, 0)
    except (TypeError, ValueError):
        return False
    return True


def per_example(
    loss: keras.losses.Loss, y: Array, prediction: Shaped[Array, "batch ..."]
) -> Float[Array, " batch"] | Float[Array, ""]:
    """The loss of each example: its mean over the batch is the loss that Keras's `fit` minimises.

    Args:
        loss: from `as_keras`. If its reduction is `"sum"` or none, each loss is multiplied by the
            number of examples.
        y: labels as the loss takes them.
        prediction: `[batch, ...]`, with Keras's mask if it has one.

    Returns:
        `[batch]` numbers of Keras's default dtype; a scalar if the loss is defined on the whole
        batch only.

    Example:

    >>> each = per_example(keras.losses.MeanSquaredError(), [0.0, 1.0], ops.array([[2.0], [1.0]]))
    >>> ops.convert_to_numpy(each).tolist()
    [4.0, 0.0]
    """
    mask = mask_of(prediction)
    y, prediction = (ops.convert_to_tensor(one, dtype=loss.dtype) for one in (y, prediction))
    values = loss.call(y, prediction)
    own = mask_of(values)
    mask = own if mask is None else mask if own is None else ops.logical_and(mask, own)
    values = ops.convert_to_tensor(values, dtype=loss.dtype)
    if mask is not None:
        mask = ops.cast(mask, values.dtype)
        values, mask = same_rank(values, mask)
        values = values * mask
    axes = tuple(range(1, len(values.shape)))
    if len(values.shape) == 0:
        each = values
    elif loss.reduction in SUMS:
        each = ops.sum(values, axes) * ops.cast(ops.shape(values)[0] * replicas(), values.dtype)
    elif mask is None:
        each = mean(values, axes)
    else:
        valid = ops.sum(mask)
        if loss.reduction != "mean_with_sample_weight":  # the mask's mean, which may be spread over axes of the values
            valid = valid * (_size(values) / _size(mask))
        each = ops.divide_no_nan(ops.sum(values, axes) * ops.cast(ops.shape(values)[0], values.dtype), valid)
    return ops.cast(each, keras.config.floatx())


def _size(array: Array) -> Array:
    return ops.cast(ops.size(array), array.dtype)


def mask_of(array: Array) -> Array | None:
    """The mask that Keras's layers and losses leave on an array, or `None`."""
    return getattr(array, "_keras_mask", None)


def same_rank(one: Array, other: Array) -> tuple[Array, Array]:
    """Two arrays of the same rank: if the ranks differ by an axis of size 1, the last axis of one
    is squeezed or added, as in Keras.

    Example:

    >>> [tuple(array.shape) for array in same_rank(ops.zeros(3), ops.zeros((3, 1)))]
    [(3, 1), (3, 1)]
    """
    ranks = len(one.shape), len(other.shape)
    if ranks[0] == ranks[1] + 1 and one.shape[-1] == 1:
        return (one, ops.expand_dims(other, -1)) if ranks[1] == 1 else (ops.squeeze(one, -1), other)
    if ranks[1] == ranks[0] + 1 and other.shape[-1] == 1:
        return (ops.expand_dims(one, -1), other) if ranks[0] == 1 else (one, ops.squeeze(other, -1))
    return one, other


class ExampleLosses:
    """A function from labels and predictions to the loss of each example, as `per_example`. It
    records the predictions.

    Args:
        loss: from `as_keras`.

    Attributes:
        loss: the same.
        predictions: the predictions that it was called with, in order.

    Example:

    >>> losses = ExampleLosses(keras.losses.BinaryCrossentropy(from_logits=True))
    >>> [round(float(value), 3) for value in losses(ops.array([0.0, 1.0]), ops.zeros((2, 1)))]
    [0.693, 0.693]
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss
        self.predictions: list[Array] = []

    def __call__(self, y: Array, prediction: Shaped[Array, "batch ..."]) -> Float[Array, " batch"] | Float[Array, ""]:
        self.predictions.append(prediction)
        return per_example(self.loss, y, prediction)

    def smoothed(
        self, y: Shaped[Array, "batch ..."], prediction: Shaped[Array, "batch ..."], spread: Float[Array, ""]
    ) -> Float[Array, " batch"] | Float[Array, ""]:
        """The losses with label smoothing, like the `label_smoothing` of Keras's losses.

        Args:
            y: labels as the loss takes them: integers, or one column per class.
            prediction: `[batch, ..., classes]`, or `[batch, 1]` for two classes.
            spread: the part of a label that is spread evenly over all classes, a scalar.
        """
        columns = prediction.shape[-1] if len(prediction.shape) > 1 else 1
        if len(y.shape) == len(prediction.shape) and y.shape[-1] == columns > 1:
            binary = getattr(self.loss, "fn", None) in _BINARY
            return self(ops.cast(y, spread.dtype) * (1.0 - spread) + spread * (0.5 if binary else 1.0 / columns), prediction)
        ignored, classes, own = ignored_class(self.loss), range(max(2, columns)), self(y, prediction)
        of_class = [ops.full_like(y, one) for one in classes]
        if ignored is not None:
            of_class = [ops.where(ops.equal(y, ignored), y, labels) for labels in of_class]
        even = sum(self(labels, prediction) for labels in of_class) / len(classes)
        return (1.0 - spread) * own + spread * even


_BINARY = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)


def ignored_class(loss: keras.losses.Loss) -> int | None:
    """The label that a loss ignores, or `None`.

    Example:

    >>> ignored_class(keras.losses.SparseCategoricalCrossentropy(ignore_class=255))
    255
    """
    return getattr(loss, "_fn_kwargs", {}).get("ignore_class")


def check_weighable(losses: Array) -> None:
    """Raises a `ValueError` if a loss has no number for each example, so that examples cannot be
    weighted."""
    if len(losses.shape) != 1:
        raise ValueError(
            "`loss` must give a number for each example where examples are weighted. Received: a loss of the whole batch"
        )
