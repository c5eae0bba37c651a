"""Where the batches of one training run come from: arrays or a dataset, from any place on, to each replica its part.

Why not Keras's own: a run that was killed goes on in the middle of a pass, on the batches that the unbroken one would have
had, so an order must follow from a seed and the number of the pass alone.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import random
from keras_blur.checks import Classes, checked
from keras_blur.meta.estimator import check_count

Array = Any


class Arrays:
    """Batches of arrays, each pass in an order that follows from a seed and its number."""

    def __init__(self, arrays: tuple[np.ndarray, ...], batch: int):
        self.arrays, self.batch = arrays, batch
        self.steps = len(arrays[0]) // batch
        self.spec = tuple(tf.TensorSpec((batch, *array.shape[1:]), array.dtype) for array in arrays)

    def stream(self, seed: Array, done: int, index: int, count: int) -> tf.data.Dataset:
        """What is left after some batches, of each the part of a replica."""
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

    def stream(self, seed: Array, done: int, index: int, count: int) -> tf.data.Dataset:
        """What is left after some batches, of each the part of a replica."""
        del seed
        parts = self.dataset.repeat().skip(done).map(lambda x, y: (x[index::count], y[index::count]))
        return parts.prefetch(2)


def source(name: str, data: Any, batch: int, replicas: int, classes: Classes) -> Arrays | Batches:
    """Where batches come from.

    Raises:
        ValueError: if data are neither a dataset nor two arrays, are too few or not finite, or a label is out of range.
    """
    if isinstance(data, tf.data.Dataset):
        size = tf.nest.flatten(data.element_spec)[0].shape[0]
        if replicas > 1 and (size is None or size % replicas):
            raise ValueError(
                f"Batches of `{name}` must be a multiple of the {replicas} replicas. Received batches of {size}"
            )
        return Batches(checked(data, None, None, classes))
    if not isinstance(data, tuple) or len(data) != 2:
        raise ValueError(
            f"`{name}` must be a tf.data.Dataset or come with labels, as a pair of arrays. Received: {type(data)}"
        )
    x, y = (np.asarray(one) for one in data)
    check_count("batch_size", batch)
    if batch % replicas:
        raise ValueError(f"`batch_size` must be a multiple of the {replicas} replicas. Received: {batch}")
    if len(x) != len(y) or len(x) < batch:
        raise ValueError(f"`{name}` must be pairs of inputs and labels, at least {batch}. Received: {len(x)} and {len(y)}")
    x = x.astype(keras.config.floatx()) if x.dtype.kind == "f" else x
    try:
        checked(x, y, None, classes)
    except ValueError as error:
        raise ValueError(f"In {'`meta_data`' if name == 'meta_data' else 'the training data'}: {error}") from error
    return Arrays((x, y), batch)
