"""What the output layer receives between the two passes: labels as +1 and -1, or the derivative of
a loss.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3 (labels)
and 3.2, eq. 1 to 4 (error). The derivatives of the Keras losses are written out below. A network
needs no other derivative to descend a loss, and no tape is recorded for it.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_blur.core.derivatives import tanh
from keras_blur.core.losses import SUMS, FunctionLoss, as_keras, mask_of

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any
TARGETS = ("classes", "indicators", "signs", "values")


def resolve_loss(loss: Any) -> keras.losses.Loss:
    """The `keras.losses.Loss` that Keras makes from a loss, or that a JSON text describes.

    Args:
        loss: a `Loss`, its name, a function of labels and predictions, or the JSON text of a
            serialized loss. A function of Keras, or a `functools.partial` of one, becomes the class
            that wraps it.

    Raises:
        ValueError: if it is none of these.

    Example:

    >>> resolve_loss("mse").name
    'mean_squared_error'
    """
    given = loss
    try:
        if isinstance(loss, str) and loss.startswith("{"):
            loss = keras.losses.deserialize(_without_identity(json.loads(loss)))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`loss` must be a keras.losses.Loss or its name. Received: {given!r}") from error
    loss = as_keras(loss)
    if type(loss) is not FunctionLoss:
        return loss
    partial = loss.fn if isinstance(loss.fn, functools.partial) and not loss.fn.args else None
    of = next((kind for function, kind in _classes() if function is (partial.func if partial else loss.fn)), None)
    if of is None:
        return loss
    options = {**(partial.keywords if partial else {}), **loss._fn_kwargs}
    if not set(options) <= set(inspect.signature(of.__init__).parameters):
        return loss
    return of(**options, reduction=loss.reduction, dtype=loss.dtype)


@functools.cache
def _classes() -> tuple[tuple[Any, Any], ...]:
    """The functions of Keras that are losses, each with the class that wraps it."""
    base, found = keras.losses.Loss, []
    for one in vars(keras.losses).values():
        if isinstance(one, type) and issubclass(one, base) and one is not base:
            found.append((one().fn, one))
    return tuple(found)


def loss_text(loss: Any) -> str:
    """A loss as JSON text; equal losses give the same text.

    Example:

    >>> loss_text("mse") == loss_text(keras.losses.MeanSquaredError())
    True
    """
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
    """The config of a loss, including the arguments that its `get_config` leaves out."""
    known = inspect.signature(type(loss).__init__).parameters
    kept = {name: value for name, value in getattr(loss, "_fn_kwargs", {}).items() if name in known}
    return {**kept, **loss.get_config()}


def target_kind(loss: keras.losses.Loss) -> str:
    """How the labels for a loss are written.

    Returns:
        `"classes"` (integers), `"indicators"` (0 and 1, one column per class), `"hinge"` (0 and 1
        if the batch has no other labels, else -1 and 1, as in Keras) or `"values"` (numbers that
        are fed back unchanged).

    Example:

    >>> target_kind(keras.losses.SparseCategoricalCrossentropy())
    'classes'
    """
    name = type(loss).__name__
    if name.startswith("Sparse") or name in ("CategoricalGeneralizedCrossEntropy", "Circle", "CTC"):
        return "classes"
    if "Crossentropy" in name or name in ("KLDivergence", "Dice", "Tversky"):
        return "indicators"
    return "hinge" if "Hinge" in name else "values"


def encode(y: Array, units: int, kind: str) -> Float[Array, "batch {units}"]:
    """Labels as the output layer receives them: `[batch, units]`, with +1 for the true class and -1
    for others.

    Args:
        y: labels: `[batch]` or `[batch, 1]` integers for `"classes"`, else `[batch, units]`
            (`[batch]` if units is 1).
        units: size of the output layer.
        kind: one of `"classes"`, `"indicators"`, `"hinge"`, `"signs"`, `"values"`.

    Raises:
        ValueError: if the shape does not fit.

    Example:

    >>> ops.convert_to_numpy(encode([0, 2], 3, "classes")).tolist()
    [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
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
        return _signs(y)
    return y


def check_loss(loss: keras.losses.Loss) -> None:
    """Checks that `error` knows the derivative of a loss.

    Args:
        loss: from `resolve_loss`.

    Raises:
        ValueError: if the loss is not one of `differentiable()`, works on probabilities of many
            classes (`from_logits=False`), or runs over another axis than the last.

    Example:

    >>> check_loss(keras.losses.CategoricalCrossentropy(from_logits=True))
    """
    _slope_of(loss)


def _slope_of(loss: keras.losses.Loss) -> tuple[Slope, dict[str, Any]]:
    """The derivative of a loss, and its arguments."""
    function: Any = getattr(loss, "fn", None)
    slope = next((slope for one, slope in _SLOPES if one is function), None)
    kind = type(loss)
    if slope is None or kind.call is not FunctionLoss.call or kind.__call__ is not keras.losses.Loss.__call__:
        name = getattr(function, "__name__", kind.__name__) if kind is FunctionLoss else kind.__name__
        raise ValueError(
            "`loss` must be one whose derivative feedback='error' knows, one of "
            f"{', '.join(differentiable())}. Received: loss={name}"
        )
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }  # fmt: skip
    options = {**defaults, **loss._fn_kwargs}
    if not options.get("from_logits", True) and slope in (_categorical, _sparse, _categorical_focal):
        raise ValueError(
            "`loss` must take logits, since no last activation of a rule is a softmax: use from_logits=True. "
            f"Received: loss={kind.__name__}(from_logits=False)"
        )
    if "axis" in options:
        axes = _axes(options["axis"])
        if axes != {1} and not (slope in (_dice, _tversky) and axes == {0, 1}):
            raise ValueError(
                f"`loss` must run over the last axis, axis=-1. Received: loss={kind.__name__}(axis={options['axis']!r})"
            )
    return slope, options


def _axes(axis: Any) -> set[int]:
    """Axes of `[batch, units]` as numbers from 0."""
    if axis is None:
        return {0, 1}
    return {int(one) % 2 if -2 <= one <= 1 else int(one) for one in (axis if isinstance(axis, (list, tuple)) else (axis,))}


def error(
    loss: keras.losses.Loss,
    y: Array,
    prediction: Float[Array, "batch *others units"],
    sample_weight: Shaped[Array, "batch ..."] | None = None,
    total: Callable[[Array], Array] | None = None,
    population: int = 0,
) -> Float[Array, "batch *others units"]:
    """The derivative of a Keras loss with respect to the prediction, with weights, masks and
    reduction.

    It is computed at least as exactly as the loss, whose `dtype` is float32 by default. Without a
    reduction, it is the derivative of the sum, which Keras's `fit` then descends.

    Args:
        loss: one of the losses of `differentiable()`, from `resolve_loss`.
        y: labels as that loss takes them.
        prediction: `[batch, *positions, units]`, with Keras's mask `[batch, *positions]` if it has
            one. Positions are those of a sequence or an image, each with a loss of its own.
        sample_weight: `[batch, *positions]`, where sizes may be 1 and a last axis of size 1 may be
            added, or `None`.
        total: a function that returns the sum of a number over the devices that share the batch, or
            `None`.
        population: number of axes before the batch: networks with a batch each. There must then be
            no weights.

    Returns:
        An array like the prediction.

    Raises:
        ValueError: if the loss fails `check_loss`, or labels do not fit the prediction.

    Example:

    >>> slope = error(keras.losses.MeanSquaredError(), [[0.0, 1.0]], ops.array([[1.0, 1.0]]))
    >>> ops.convert_to_numpy(slope).tolist()
    [[1.0, 0.0]]
    """
    function, options = _slope_of(loss)
    rank = len(prediction.shape) - population - 1  # of the losses
    if rank > 1 and options.get("axis", -1) not in (None, -1, rank, [-1], (-1,)):
        raise ValueError(
            "`loss` must run over the last axis, axis=-1, or over all of them, axis=None, where the outputs have positions. "
            f"Received: loss={type(loss).__name__}(axis={options['axis']!r}) for outputs of shape {tuple(prediction.shape)}"
        )
    whole = function in (_dice, _tversky) and _axes(options["axis"]) == {0, 1}
    if whole and total is not None:
        raise ValueError(
            "`loss` must be computed for each example on several replicas, for instance with axis=-1. Received: "
            f"loss={type(loss).__name__}(axis={options['axis']!r})"
        )
    if "axis" in options:
        options["axis"] = tuple(range(-rank - 1, 0)) if whole else -1
    given, mask = keras.backend.standardize_dtype(prediction.dtype), mask_of(prediction)
    squeezed = rank > 1 and prediction.shape[-1] == 1 and len(ops.shape(y)) == len(prediction.shape) - 1 and mask is None
    if squeezed and target_kind(loss) != "classes":  # Keras takes the last axis of positions for the units
        return error(loss, y, prediction[..., 0], sample_weight, total, population)[..., None]
    # Keras's `result_type` of float64 is float32 on JAX.
    prediction = ops.cast(prediction, given if given == "float64" else keras.backend.result_type(given, loss.dtype))
    if target_kind(loss) == "classes":
        y = _integers(y, prediction, column=function is not _generalized)
    else:
        y = _columns_of(y, prediction)
    slope = function(options, y, prediction)
    weight = None if mask is None else ops.cast(mask, prediction.dtype)[..., None]
    ignored = options.get("ignore_class")
    if ignored is not None:
        valid = ops.cast(ops.not_equal(y, ops.cast(ignored, y.dtype)), prediction.dtype)[..., None]
        weight = valid if weight is None else weight * valid
    counted = weight
    if sample_weight is not None:
        sample_weight = _weights(ops.cast(sample_weight, prediction.dtype), prediction)
        weight = sample_weight if weight is None else weight * sample_weight
    if whole and weight is None:
        return ops.cast(slope, given)
    if weight is not None:
        slope = slope * (ops.sum(weight) if whole else weight)
    if loss.reduction in SUMS:
        return ops.cast(slope, given)
    if loss.reduction == "mean_with_sample_weight":
        counted = weight
    if counted is None:
        sizes = ops.shape(prediction if not whole else weight)[population:-1]
        divisor = ops.cast(math.prod(sizes[1:], start=sizes[0]), prediction.dtype)
    else:
        divisor = ops.sum(counted, axis=tuple(range(-rank - 1, 0)), keepdims=True)
    return ops.cast(ops.divide_no_nan(slope, divisor if total is None else total(divisor)), given)


def _integers(y: Array, prediction: Array, column: bool) -> Array:
    """Integer labels, one for each row of the prediction."""
    y = ops.convert_to_tensor(y)
    if column and len(y.shape) == len(prediction.shape) and y.shape[-1] == 1:
        y = y[..., 0]
    if len(y.shape) != len(prediction.shape) - 1:
        places = ", ".join(["batch", *map(str, prediction.shape[1:-1])])
        flat = f"({places})" if "," in places else f"({places},)"
        shapes = f"{flat} or ({places}, 1)" if column else flat
        raise ValueError(f"Integer labels must have shape {shapes}. Received shape {tuple(y.shape)}.")
    return y


def _weights(weight: Array, prediction: Array) -> Array:
    """Sample weights with an axis for the units."""
    rank = len(prediction.shape) - 1
    if len(weight.shape) == rank + 1 and weight.shape[-1] == 1:
        return weight
    if len(weight.shape) != rank:
        raise ValueError(
            f"Sample weights must have {rank} axes, those of the outputs without the last; sizes after the first may be 1. "
            f"Received shape {tuple(weight.shape)} for outputs of shape {tuple(prediction.shape)}."
        )
    return weight[..., None]


def _columns_of(y: Array, prediction: Array) -> Array:
    """Labels, with one column for each unit."""
    y = ops.cast(y, prediction.dtype)
    if len(y.shape) == 1:
        y = y[:, None]
    elif len(y.shape) == len(prediction.shape) + 1 and y.shape[-1] == 1:
        y = y[..., 0]
    if len(y.shape) > len(prediction.shape) or y.shape[-1] != prediction.shape[-1]:
        raise ValueError(
            f"Labels must have as many columns as the output layer has units ({prediction.shape[-1]}). "
            f"Received shape {tuple(y.shape)}. For integer labels use a sparse loss."
        )
    return y


def differentiable() -> list[str]:
    """Names of the Keras losses that `feedback="error"` can descend.

    Example:

    >>> "MeanSquaredError" in differentiable()
    True
    """
    known = {kind.__name__ for function, kind in _classes() for one, _ in _SLOPES if one is function}
    return sorted(known)


Slope = Callable[[dict[str, Any], Array, Array], Array]


def _columns(p: Array) -> float:
    return float(p.shape[-1])


def _where(condition: Array, value: Array) -> Array:
    return ops.where(condition, value, ops.zeros_like(value))


def _squared(options: dict[str, Any], y: Array, p: Array) -> Array:
    return 2.0 * (p - y) / _columns(p)


def _absolute(options: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.sign(p - y) / _columns(p)


def _percentage(options: dict[str, Any], y: Array, p: Array) -> Array:
    return 100.0 * ops.sign(p - y) / ops.maximum(ops.abs(y), keras.config.epsilon()) / _columns(p)


def _squared_logarithmic(options: dict[str, Any], y: Array, p: Array) -> Array:
    low = keras.config.epsilon()
    positive, target = ops.maximum(p, low), ops.maximum(y, low)
    slope = 2.0 * (ops.log(positive + 1.0) - ops.log(target + 1.0)) / (positive + 1.0)
    return _where(p >= low, slope) / _columns(p)


def _cosine(options: dict[str, Any], y: Array, p: Array) -> Array:
    y, p = ops.broadcast_to(y, ops.shape(p)), ops.convert_to_tensor(p)
    most = 1.0 / keras.config.epsilon()  # where Keras stops dividing by a small norm
    scale_y = ops.minimum(ops.rsqrt(ops.sum(ops.square(y), axis=-1, keepdims=True)), most)
    scale = ops.rsqrt(ops.sum(ops.square(p), axis=-1, keepdims=True))
    y, direction = y * scale_y, p * ops.minimum(scale, most)
    along = _where(scale <= most, ops.sum(direction * y, axis=-1, keepdims=True) * direction)
    return (along - y) * ops.minimum(scale, most)


def _huber(options: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.clip(p - y, -options["delta"], options["delta"]) / _columns(p)


def _log_cosh(options: dict[str, Any], y: Array, p: Array) -> Array:
    return tanh(p - y) / _columns(p)


def _hinge(options: dict[str, Any], y: Array, p: Array) -> Array:
    y = _signs(y)
    return _where(1.0 - y * p >= 0, ops.broadcast_to(-y, ops.shape(p))) / _columns(p)


def _squared_hinge(options: dict[str, Any], y: Array, p: Array) -> Array:
    y = _signs(y)
    return -2.0 * y * ops.relu(1.0 - y * p) / _columns(p)


def _categorical_hinge(options: dict[str, Any], y: Array, p: Array) -> Array:
    others = (1.0 - y) * p
    largest = ops.max(others, axis=-1, keepdims=True)
    hit = ops.cast(others == largest, p.dtype)  # among equals the derivative is shared
    slope = (1.0 - y) * hit / ops.sum(hit, axis=-1, keepdims=True) - y
    return _where(largest - ops.sum(y * p, axis=-1, keepdims=True) + 1.0 >= 0, slope)


def _signs(y: Array) -> Array:
    return ops.where(ops.all((y == 0) | (y == 1)), 2.0 * y - 1.0, y)


def _divergence(options: dict[str, Any], y: Array, p: Array) -> Array:
    low = keras.config.epsilon()
    return _where((p >= low) & (p <= 1.0), -ops.clip(y, low, 1.0) / ops.clip(p, low, 1.0))


def _poisson(options: dict[str, Any], y: Array, p: Array) -> Array:
    return (1.0 - y / (p + keras.config.epsilon())) / _columns(p)


def _categorical(options: dict[str, Any], y: Array, p: Array) -> Array:
    y = _smoothed(options, y, p)
    return ops.softmax(p) * ops.sum(y, axis=-1, keepdims=True) - y


def _smoothed(options: dict[str, Any], y: Array, p: Array) -> Array:
    return y * (1.0 - options["label_smoothing"]) + options["label_smoothing"] / _columns(p)


def _categorical_focal(options: dict[str, Any], y: Array, p: Array) -> Array:
    y, q, gamma = _smoothed(options, y, p), ops.softmax(p), options["gamma"]
    alpha = ops.convert_to_tensor(options["alpha"], p.dtype)
    if tuple(alpha.shape) not in ((), (p.shape[-1],)):
        raise ValueError(
            f"`loss` must have one alpha, or one for each of the {p.shape[-1]} unit(s). Received: alpha={options['alpha']!r}"
        )
    low = keras.config.epsilon()
    c = ops.clip(q, low, 1.0 - low)
    rest = 1.0 - c
    slope = gamma * ops.power(rest, gamma - 1.0) * ops.log(c) - ops.power(rest, gamma) / c
    slope = _where((q >= low) & (q <= 1.0 - low), alpha * y * slope)
    return q * (slope - ops.sum(slope * q, axis=-1, keepdims=True))


def _sparse(options: dict[str, Any], y: Array, p: Array) -> Array:
    return ops.softmax(p) - _one_hot(y, p)


def _one_hot(y: Array, p: Array) -> Array:
    labels = ops.broadcast_to(ops.cast(y, "int32"), ops.shape(p)[:-1])
    return ops.one_hot(labels, p.shape[-1], dtype=p.dtype)


def _generalized(options: dict[str, Any], y: Array, p: Array) -> Array:
    if p.shape[-1] == 1:
        raise ValueError("`loss` must have an output for each class. Received: one output for a generalized cross-entropy")
    hot = _one_hot(y, p)
    return -hot * ops.power(ops.sum(p * hot, axis=-1, keepdims=True), options["q"] - 1.0)


def _binary(options: dict[str, Any], y: Array, p: Array) -> Array:
    y = y * (1.0 - options["label_smoothing"]) + 0.5 * options["label_smoothing"]
    if options["from_logits"]:
        return (ops.sigmoid(p) - y) / _columns(p)
    return _of_probabilities(y, p)[1] / _columns(p)


def _of_probabilities(y: Array, p: Array) -> tuple[Array, Array]:
    """A binary cross-entropy and its derivative, flat where Keras clips."""
    low = keras.config.epsilon()
    q = ops.clip(p, low, 1.0 - low)
    slope = _where((p >= low) & (p <= 1.0 - low), (q - y) / (q * (1.0 - q)))
    return -y * ops.log(q) - (1.0 - y) * ops.log(1.0 - q), slope


def _binary_focal(options: dict[str, Any], y: Array, p: Array) -> Array:
    y = y * (1.0 - options["label_smoothing"]) + 0.5 * options["label_smoothing"]
    gamma, logits = options["gamma"], options["from_logits"]
    q = ops.sigmoid(p) if logits else p
    if logits:
        value, slope = ops.softplus(p) - y * p, q - y
        inner = q * (1.0 - q)
    else:
        value, slope = _of_probabilities(y, p)
        inner = ops.ones_like(p)
    rest = 1.0 - y * q - (1.0 - y) * (1.0 - q)
    power = ops.power(rest, gamma)
    found = power * slope - gamma * ops.power(rest, gamma - 1.0) * (2.0 * y - 1.0) * inner * value
    if options["apply_class_balancing"]:
        found = found * (y * options["alpha"] + (1.0 - y) * (1.0 - options["alpha"]))
    return found / _columns(p)


def _dice(options: dict[str, Any], y: Array, p: Array) -> Array:
    axis = options["axis"]
    both = ops.sum(y * p, axis=axis, keepdims=True)
    whole = ops.sum(y, axis=axis, keepdims=True) + ops.sum(p, axis=axis, keepdims=True) + keras.config.epsilon()
    return 2.0 * (both / whole - y) / whole


def _tversky(options: dict[str, Any], y: Array, p: Array) -> Array:
    axis, alpha, beta = (options[name] for name in ("axis", "alpha", "beta"))
    both, missed, extra = (ops.sum(one, axis=axis, keepdims=True) for one in (y * p, (1.0 - p) * y, p * (1.0 - y)))
    whole = both + alpha * missed + beta * extra + keras.config.epsilon()
    return (both / whole * (y - alpha * y + beta * (1.0 - y)) - y) / whole


_SLOPES: tuple[tuple[Any, Slope], ...] = (
    (keras.losses.mean_squared_error, _squared),
    (keras.losses.mean_absolute_error, _absolute),
    (keras.losses.mean_absolute_percentage_error, _percentage),
    (keras.losses.mean_squared_logarithmic_error, _squared_logarithmic),
    (keras.losses.cosine_similarity, _cosine),
    (keras.losses.huber, _huber),
    (keras.losses.log_cosh, _log_cosh),
    (keras.losses.hinge, _hinge),
    (keras.losses.squared_hinge, _squared_hinge),
    (keras.losses.categorical_hinge, _categorical_hinge),
    (keras.losses.kl_divergence, _divergence),
    (keras.losses.poisson, _poisson),
    (keras.losses.categorical_crossentropy, _categorical),
    (keras.losses.categorical_focal_crossentropy, _categorical_focal),
    (keras.losses.sparse_categorical_crossentropy, _sparse),
    (keras.losses.categorical_generalized_cross_entropy, _generalized),
    (keras.losses.binary_crossentropy, _binary),
    (keras.losses.binary_focal_crossentropy, _binary_focal),
    (keras.losses.dice, _dice),
    (keras.losses.tversky, _tversky),
)
