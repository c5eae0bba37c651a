"""What the output layer receives between the two sweeps: labels as +1 and -1, or the derivative of a loss.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3 (labels) and 3.2, eq. 1 to 4
(error). The derivatives of the Keras losses are written out, one line each: they are the only calculus that a network needs
to descend a loss, and no tape is recorded for it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

Array = Any
TARGETS = ("classes", "indicators", "signs", "values")


def resolve_loss(loss: Any) -> keras.losses.Loss:
    """The `keras.losses.Loss` of an instance, a name, or the JSON text of a serialized loss.

    Raises:
        ValueError: if it is none of these.
    """
    given = loss
    try:
        if isinstance(loss, str) and loss.startswith("{"):
            loss = keras.losses.deserialize(_without_identity(json.loads(loss)))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`loss` must be a keras.losses.Loss or its name. Received: {given!r}") from error
    if isinstance(loss, keras.losses.Loss):
        return loss
    try:
        function = keras.losses.get(loss)
    except ValueError as error:
        raise ValueError(f"`loss` must be a keras.losses.Loss or its name. Received: {loss!r}") from error
    if isinstance(function, keras.losses.Loss):
        return function
    base = keras.losses.Loss
    for candidate in vars(keras.losses).values():  # for some names Keras gives a function: take the loss that wraps it
        if isinstance(candidate, type) and issubclass(candidate, base) and candidate is not base:
            try:
                instance = candidate()
            except (TypeError, ValueError):
                continue
            if getattr(instance, "fn", None) is function:
                return instance
    raise ValueError(f"`loss` must be a keras.losses.Loss or its name. Received: {loss!r}")


def loss_text(loss: Any) -> str:
    """A loss as JSON text, the same for equal losses."""
    loss = resolve_loss(loss)
    document = keras.losses.serialize(loss)
    document["config"] = {**_arguments(loss), **document["config"]}  # Keras leaves the delta of a Huber loss out
    return json.dumps(_without_identity(document), sort_keys=True)


def _without_identity(document: Any) -> Any:
    """A config without the memory addresses that Keras adds while a model is being saved."""
    if isinstance(document, dict):
        return {key: _without_identity(value) for key, value in document.items() if key != "shared_object_id"}
    if isinstance(document, list):
        return [_without_identity(value) for value in document]
    return document


def _arguments(loss: keras.losses.Loss) -> dict[str, Any]:
    """The config of a loss, with those of its arguments that its `get_config` forgets."""
    known = inspect.signature(type(loss).__init__).parameters
    kept = {name: value for name, value in getattr(loss, "_fn_kwargs", {}).items() if name in known}
    return {**kept, **loss.get_config()}


def target_kind(loss: keras.losses.Loss) -> str:
    """How labels are written that go with a loss.

    Returns:
        `"classes"` (integers), `"indicators"` (0 and 1, one column a class), `"hinge"` (either 0 and 1 or -1 and 1, told
        from the batch, as Keras does) or `"values"` (numbers to be fed as they are).
    """
    name = type(loss).__name__
    if name.startswith("Sparse"):
        return "classes"
    if "Crossentropy" in name or name in ("KLDivergence", "Dice", "Tversky"):
        return "indicators"
    return "hinge" if "Hinge" in name else "values"


def encode(y: Array, units: int, kind: str) -> Array:
    """Labels as the output layer receives them: `[batch, units]`, +1 for the true class and -1 for others.

    Args:
        y: labels: `[batch]` or `[batch, 1]` integers for `"classes"`, else `[batch, units]` (`[batch]` if units is 1).
        units: size of the output layer.
        kind: one of `"classes"`, `"indicators"`, `"hinge"`, `"signs"`, `"values"`.

    Raises:
        ValueError: if the shape does not fit.
    """
    y = ops.convert_to_tensor(y)
    if kind == "classes":
        if len(y.shape) == 2 and y.shape[-1] == 1:
            y = y[:, 0]
        if len(y.shape) != 1:
            raise ValueError(f"Integer labels must have shape (batch,) or (batch, 1). Received shape {tuple(y.shape)}.")
        if units == 1:
            return 2.0 * ops.cast(y, "float32")[:, None] - 1.0
        return 2.0 * ops.one_hot(ops.cast(y, "int32"), units, dtype="float32") - 1.0
    if len(y.shape) == 1:
        y = y[:, None]
    if len(y.shape) != 2 or y.shape[-1] != units:
        raise ValueError(
            f"Labels must have shape (batch, {units}), as the output layer has {units} unit(s). Received shape "
            f"{tuple(y.shape)}. For integer labels use a sparse loss, or targets='classes'."
        )
    y = ops.cast(y, "float32")
    if kind == "indicators":
        return 2.0 * y - 1.0
    if kind == "hinge":
        return ops.where(ops.any(y < 0), y, 2.0 * y - 1.0)
    return y


def error(
    loss: keras.losses.Loss,
    y: Array,
    prediction: Array,
    sample_weight: Array | None = None,
    total: Callable[[Array], Array] | None = None,
) -> Array:
    """The derivative of a Keras loss by the prediction, weights and reduction included.

    Args:
        loss: one of the losses of `differentiable()`.
        y: labels as that loss takes them.
        prediction: `[batch, units]`; without weights, leading axes stand for networks with a batch each.
        sample_weight: `[batch]` or `[batch, 1]`, or `None`.
        total: gives the sum of a number over the devices that share the batch, if several do.

    Returns:
        An array like the prediction.

    Raises:
        ValueError: if the derivative of the loss is not known, or it works on probabilities of many classes.

    Example:

    >>> error(keras.losses.MeanSquaredError(), [[0.0, 1.0]], ops.array([[1.0, 1.0]])).numpy().tolist()
    [[1.0, 0.0]]
    """
    name = type(loss).__name__
    if name not in _DERIVATIVES:
        raise ValueError(
            f"The derivative of the loss {name} is not known to feedback='error'. Known: {', '.join(differentiable())}."
        )
    y = ops.convert_to_tensor(y)
    if name.startswith("Sparse"):
        if len(y.shape) != len(prediction.shape) - 1 and tuple(y.shape[1:]) != (1,):
            raise ValueError(f"Integer labels must have shape (batch,) or (batch, 1). Received shape {tuple(y.shape)}.")
    else:
        y = ops.cast(y, prediction.dtype)
        if len(y.shape) == 1:
            y = y[:, None]
        if y.shape[-1] != prediction.shape[-1]:
            raise ValueError(
                f"Labels must have as many columns as the output layer has units ({prediction.shape[-1]}). "
                f"Received shape {tuple(y.shape)}. For integer labels use a sparse loss."
            )
    slope = _DERIVATIVES[name](_arguments(loss), y, prediction)
    if sample_weight is not None:
        sample_weight = ops.reshape(ops.cast(sample_weight, prediction.dtype), (-1, 1))
        slope = slope * sample_weight
    reduction = loss.reduction
    if reduction == "sum":
        return slope
    if reduction in ("sum_over_batch_size", "mean", "mean_with_sample_weight"):
        weighs = reduction == "mean_with_sample_weight" and sample_weight is not None
        divisor = ops.cast(ops.sum(sample_weight) if weighs else ops.shape(prediction)[-2], prediction.dtype)
        return slope / (divisor if total is None else total(divisor))
    raise ValueError(f"The loss must have a reduction for feedback='error'. Received: reduction={reduction!r}")


def differentiable() -> list[str]:
    """Names of the Keras losses that `feedback="error"` can descend."""
    return sorted(_DERIVATIVES)


def _columns(p: Array) -> float:
    return float(p.shape[-1])


def _squared(config: dict[str, Any], y: Array, p: Array) -> Array:
    return 2.0 * (p - y) / _columns(p)


def _absolute(config: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.sign(p - y) / _columns(p)


def _huber(config: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.clip(p - y, -config.get("delta", 1.0), config.get("delta", 1.0)) / _columns(p)


def _log_cosh(config: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.tanh(p - y) / _columns(p)


def _hinge(config: dict[str, Any], y: Array, p: Array) -> Array:
    y = ops.cast(encode(y, p.shape[-1], "hinge"), p.dtype)
    return ops.where(1.0 - y * p > 0, -y, ops.zeros_like(p)) / _columns(p)


def _squared_hinge(config: dict[str, Any], y: Array, p: Array) -> Array:
    y = ops.cast(encode(y, p.shape[-1], "hinge"), p.dtype)
    return -2.0 * y * ops.relu(1.0 - y * p) / _columns(p)


def _poisson(config: dict[str, Any], y: Array, p: Array) -> Array:
    return (1.0 - y / (p + keras.config.epsilon())) / _columns(p)


def _categorical(config: dict[str, Any], y: Array, p: Array) -> Array:
    _need_logits(config)
    smoothing = config.get("label_smoothing", 0.0)
    y = y * (1.0 - smoothing) + smoothing / _columns(p)
    return ops.softmax(p) * ops.sum(y, axis=-1, keepdims=True) - y


def _sparse(config: dict[str, Any], y: Array, p: Array) -> Array:
    _need_logits(config)
    if config.get("ignore_class") is not None:
        raise ValueError("feedback='error' does not support `ignore_class`; give those examples a sample weight of 0.")
    labels = ops.reshape(ops.cast(y, "int32"), ops.shape(p)[:-1])
    return ops.softmax(p) - ops.one_hot(labels, p.shape[-1], dtype=p.dtype)


def _binary(config: dict[str, Any], y: Array, p: Array) -> Array:
    smoothing = config.get("label_smoothing", 0.0)
    y = y * (1.0 - smoothing) + 0.5 * smoothing
    if config.get("from_logits"):
        return (ops.sigmoid(p) - y) / _columns(p)
    low = keras.config.epsilon()
    inside = ops.logical_and(p >= low, p <= 1.0 - low)
    q = ops.clip(p, low, 1.0 - low)
    return ops.where(inside, (q - y) / (q * (1.0 - q)), ops.zeros_like(p)) / _columns(p)


def _need_logits(config: dict[str, Any]) -> None:
    if not config.get("from_logits"):
        raise ValueError(
            "A categorical cross-entropy must work on the outputs themselves: use from_logits=True (and a linear last "
            "activation). Received: from_logits=False"
        )


_DERIVATIVES: dict[str, Callable[[dict[str, Any], Array, Array], Array]] = {
    "MeanSquaredError": _squared,
    "MeanAbsoluteError": _absolute,
    "Huber": _huber,
    "LogCosh": _log_cosh,
    "Hinge": _hinge,
    "SquaredHinge": _squared_hinge,
    "Poisson": _poisson,
    "CategoricalCrossentropy": _categorical,
    "SparseCategoricalCrossentropy": _sparse,
    "BinaryCrossentropy": _binary,
}
