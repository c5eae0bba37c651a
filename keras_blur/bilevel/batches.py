"""Batches of a training run, from arrays or datasets, resumable at any position and sharded.

Keras's own data adapters cannot be used. A killed run resumes in the middle of an epoch with the
batches of the uninterrupted run, so the order must follow from a seed and the number of the pass
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.checks import Expected, checked, checked_arrays, plain_errors
from keras_blur.core import random

Array = Any


class Arrays:
    """Batches of arrays. The order of each pass follows from a seed and the pass number."""

    def __init__(self, arrays: tuple[np.ndarray, ...], batch: int):
        self.arrays, self.batch = arrays, batch
        self.steps = len(arrays[0]) // batch
        self.spec = tuple(tf.TensorSpec((batch, *array.shape[1:]), array.dtype) for array in arrays)

    def settings(self) -> dict[str, Any]:
        """The settings that identify the data."""
        x, y = self.arrays
        return {"x": x, "y": y, "batch_size": self.batch}

    def stream(self, seed: Array, done: int, index: int, count: int) -> tf.data.Dataset:
        """The remaining batches after `done` batches; the part of one replica of each."""
        whole, rest = divmod(done, self.steps)
        arrays = tuple(tf.constant(array) for array in self.arrays)
        size, batch = len(self.arrays[0]), self.batch

        def one_pass(number: Array) -> tf.data.Dataset:
            order = random.permutation(random.fold_in(seed, number), size)[: self.steps * batch]
            return tf.data.Dataset.from_tensor_slices(tf.reshape(order, (self.steps, batch)))

        def pick(chosen: Array) -> Any:
            return tuple(tf.gather(array, chosen[index::count]) for array in arrays)

        passes = tf.data.Dataset.range(whole, np.iinfo(np.int32).max).flat_map(one_pass)
        return passes.skip(rest).map(pick).prefetch(2)


class Batches:
    """Batches of a dataset."""

    def __init__(self, dataset: tf.data.Dataset):
        self.dataset = dataset
        self.spec = dataset.element_spec
        self.steps = max(0, int(dataset.cardinality()))

    def settings(self) -> dict[str, Any]:
        """The settings that identify the dataset, as far as they are known."""
        shapes = [f"{one.dtype.name} {one.shape}" for one in tf.nest.flatten(self.spec)]
        return {"dataset": shapes, "batches": self.steps}

    def stream(self, seed: Array, done: int, index: int, count: int) -> tf.data.Dataset:
        """The remaining batches after `done` batches; the part of one replica of each."""
        del seed
        parts = self.dataset.repeat().skip(done).map(lambda x, y: (x[index::count], y[index::count]))
        return parts.prefetch(2)


def source(
    name: str, data: Any, batch: int, replicas: int, expected: Callable[[], Expected], within: str | None = None
) -> Arrays | Batches:
    """Checks data and returns the source of their batches.

    Args:
        name: name of the argument, for messages.
        data: a `tf.data.Dataset` or `PyDataset` of batches (x, y), or a pair of arrays.
        batch: batch size for arrays.
        replicas: number of replicas, which split each batch.
        expected: returns the data specification of the model.
        within: `name`, if messages should say that x and y belong to it.

    Raises:
        ValueError: if the data have another type, are too few, or fail a check.
    """
    if isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        dataset = checked(data, None, None, expected, within=within)[0]
        if isinstance(data, keras.utils.PyDataset):
            dataset = _from_py_dataset(dataset)
        if len(dataset.element_spec) != 2:
            raise ValueError(f"`{name}` must give batches (x, y). Received: batches of {len(dataset.element_spec)} parts")
        size = dataset.element_spec[0].shape[0]
        if replicas > 1 and (size is None or size % replicas):
            raise ValueError(
                f"Batches of `{name}` must be a multiple of the {replicas} replicas. Received: batches of {size}"
            )
        return Batches(dataset)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(
            f"`{name}` must be a tf.data.Dataset or a PyDataset, or come with labels, as a pair of arrays. "
            f"Received: {type(data).__name__}"
        )
    arguments.count("batch_size", batch)
    if batch % replicas:
        raise ValueError(f"`batch_size` must be a multiple of the {replicas} replicas. Received: {batch}")
    x, y = (np.asarray(one) for one in checked_arrays(data[0], data[1], None, expected(), within)[:2])
    if len(x) < batch:
        raise ValueError(f"`{name}` must hold at least `batch_size` examples, {batch}. Received: {len(x)}")
    return Arrays((x.astype(keras.config.floatx()) if x.dtype.kind == "f" else x, y), batch)


def _from_py_dataset(data: keras.utils.PyDataset) -> tf.data.Dataset:
    """Converts one pass of a `PyDataset` to a dataset."""
    count = data.num_batches
    with plain_errors():
        first = data[0]

    def batches() -> Iterator[Any]:
        data.on_epoch_begin()
        for index in itertools.count() if count is None else range(count):
            yield data[index]
        data.on_epoch_end()

    spec = tuple(tf.TensorSpec((None, *np.shape(part)[1:]), np.asarray(part).dtype) for part in first)
    dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
    return dataset if count is None else dataset.apply(tf.data.experimental.assert_cardinality(count))
