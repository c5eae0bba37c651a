"""Checks of `tf.data` datasets: element specs at once, batches as they arrive.

Each batch is checked inside the graph of the dataset, with one boolean as the result. Only a batch
that fails goes through the numpy checks, which raise the error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_blur.checks.data import ROUNDING, Check, Expected, described, ready, text_of

Array = Any


def checked_dataset(check: Check, dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Checks the element spec of a dataset; the returned dataset checks its batches."""
    expected = check.expected()
    spec = dataset.element_spec
    x, y, weight = check.parts(spec)
    _check_specs(check, expected, x, y, weight)
    if dataset.cardinality() == 0:
        check.refuse("x", "hold at least one example", "a dataset without batches")

    @tf.autograph.experimental.do_not_convert
    def mapped(*batch: Any) -> Any:
        return _mapped(check, batch if type(spec) is tuple else batch[0])

    return dataset.map(mapped)


def _check_specs(check: Check, expected: Expected, x: Any, y: Any, weight: Any) -> None:
    """Checks the known shapes and dtypes of a dataset's elements."""
    parts = [("x", x)]
    if check.labelled:
        parts += [("y", y)] if weight is None else [("y", y), ("sample_weight", weight)]
    shapes = []
    for name, spec in parts:
        if spec is None:
            check.refuse(name, "be given", f"{name}=None")
        if not isinstance(spec, tf.TensorSpec):
            of_shape = f" of shape {text_of(expected.features)}" if name == "x" and expected.features else ""
            check.refuse(name, f"be one array{of_shape}", described(spec))
        check.check_dtype(name, np.dtype(spec.dtype.as_numpy_dtype), expected)
        shapes.append(None if spec.shape.rank is None else tuple(spec.shape))
    check.check_shapes(expected, *shapes)


def _mapped(check: Check, batch: Any) -> Any:
    """Checks a batch in the graph, and with `Check.batch` if that check fails."""
    expected = check.expected()
    parts = [part for part in check.parts(batch) if part is not None][: 3 if check.labelled else 1]
    known = all(part.shape.rank is not None and None not in part.shape[1:] for part in parts)

    def explain(*arrays: np.ndarray) -> np.bool_:
        check.batch(arrays)
        return np.True_

    def look() -> Array:
        return tf.numpy_function(explain, parts, tf.bool)

    sound = _sound(expected, *parts)
    with tf.control_dependencies([tf.cond(sound, lambda: True, look) if known else look()]):
        parts = [tf.identity(part) for part in parts]
    if expected.features is not None and parts[0].shape.rank is None:
        parts[0] = tf.ensure_shape(parts[0], (None, *expected.features))
    made = ready(expected, *parts, *[None] * (3 - len(parts)))
    return tuple(made[: len(parts)])


def _sound(expected: Expected, x: Array, y: Array = None, weight: Array = None) -> Array:
    """Whether a batch of tensors is valid. A finite batch whose sum overflows gives `False` and is
    left to the numpy checks."""
    found = []
    for value in (x, y, weight):
        if value is not None and value.dtype.is_floating:
            wide = tf.cast(value, tf.float32) if value.dtype.size < 4 else value
            found.append(tf.math.is_finite(tf.reduce_sum(wide)))
        if value is not None and x.shape.rank and value.shape.rank:
            found.append(tf.equal(tf.shape(value)[0], tf.shape(x)[0]))
    if weight is not None:
        found.append(tf.reduce_min(weight) >= 0)
    if y is None or y.dtype == tf.bool:
        found.append(tf.constant(expected.labels != "signs" or y is None))
    elif expected.labels == "classes":
        label = y if y.dtype.is_floating else tf.cast(y, tf.int64)
        if expected.ignored is not None:
            label = tf.where(tf.equal(label, tf.cast(expected.ignored, label.dtype)), tf.zeros_like(label), label)
        found.append(tf.reduce_min(label) >= 0)
        if expected.classes is not None:
            found.append(tf.reduce_max(label) < expected.classes)
        if y.dtype.is_floating:
            found.append(tf.reduce_all(tf.equal(label, tf.floor(label))))
    elif expected.labels in ("indicators", "hinge", "signs"):
        label = tf.cast(y, tf.float32)
        low = 0.0 if expected.labels == "indicators" else -1.0
        found += [tf.reduce_min(label) >= low - ROUNDING, tf.reduce_max(label) <= 1.0 + ROUNDING]
        if expected.labels == "signs":
            found.append(tf.reduce_all(tf.equal(tf.abs(label), 1.0)))
    return tf.reduce_all(tf.stack(found))
