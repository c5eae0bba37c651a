"""Endless data on TensorFlow: `tf.data`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Array = Any


def is_dataset(value: Any) -> bool:
    """Whether a value is a `tf.data.Dataset`."""
    return isinstance(value, tf.data.Dataset)


def on_cpu() -> Any:
    """A scope whose arrays are on the CPU."""
    return tf.device("CPU")


def constant(value: np.ndarray) -> Array:
    """An array on the CPU, where streams are drawn: a graph refers to it and holds no copy."""
    with tf.init_scope(), on_cpu():
        return tf.constant(value)


def stream(
    draws: Sequence[Callable[[Array], Any]], which: Callable[[int], int] | None, start: int | tf.Variable, stride: int
) -> tf.data.Dataset:
    """An endless dataset of draws of the numbers `start`, `start + stride`, ... in order.

    Args:
        draws: functions from a number to a nest of arrays, all of the same shapes.
        which: the index of the function to call, for a number; `None` for the only one.
        start: the first number. The value of a variable is read when iteration starts.
        stride: step between numbers.
    """
    numbers = tf.data.Dataset.from_tensors(0).flat_map(
        lambda _: tf.data.Dataset.counter(start=tf.cast(tf.convert_to_tensor(start), tf.int64), step=stride)
    )

    def draw(number: Array) -> Any:
        if which is None:
            return draws[0](number)
        chosen = tf.numpy_function(lambda number: np.int32(which(int(number))), [number], tf.int32)
        branches = [functools.partial(one, number) for one in draws]
        return tf.switch_case(tf.ensure_shape(chosen, ()), branches)

    draw = tf.autograph.experimental.do_not_convert(draw)  # AutoGraph would bury what an error says
    return _untuned(numbers.map(draw, num_parallel_calls=1, deterministic=True).prefetch(4))


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset without autotuning, which has nothing to tune here. Its thread sleeps for up to a
    minute, and whoever deletes an iterator may have to wait for it."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def passes(arrays: Sequence[np.ndarray], rows: Callable[[Array], Array], first: int, skipped: int) -> tf.data.Dataset:
    """An endless iterable of batches of arrays.

    Args:
        arrays: `[n, ...]`.
        rows: maps the number of a pass, an int32 array, to the indices of its batches,
            `[batches, batch]`.
        first: number of the first pass.
        skipped: number of its batches to leave out.
    """
    held = [tf.constant(array) for array in arrays]
    numbers = tf.data.Dataset.range(first, np.iinfo(np.int32).max)
    chosen = numbers.flat_map(lambda number: tf.data.Dataset.from_tensor_slices(rows(number)))
    return _untuned(chosen.skip(skipped).map(lambda row: tuple(tf.gather(array, row) for array in held)).prefetch(2))


def repeated(data: Any, skipped: int, index: int, count: int) -> tf.data.Dataset:
    """An endless iterable of the batches of passes over data.

    Args:
        data: a `tf.data.Dataset`, or an iterable of numpy batches with an `element_spec`: shapes
            and dtypes of the parts of a batch.
        skipped: number of batches to leave out.
        index, count: which examples of each batch: `index`, `index + count`, ...
    """
    dataset = data
    if not isinstance(data, tf.data.Dataset):
        spec = tuple(tf.TensorSpec(one.shape, one.dtype) for one in data.element_spec)
        dataset = _untuned(tf.data.Dataset.from_generator(lambda: iter(data), output_signature=spec))
    return dataset.repeat().skip(skipped).map(lambda *batch: tuple(part[index::count] for part in batch)).prefetch(2)
