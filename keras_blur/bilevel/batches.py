"""Batches of a training run, from arrays or datasets, resumable at any position and sharded.

Keras's own data adapters cannot be used. A killed run resumes in the middle of an epoch with the
batches of the uninterrupted run, so the order must follow from a seed and the number of the pass
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.checks import Expected, checked, checked_arrays, plain_errors
from keras_blur.core import random

Array = Any


class Spec(NamedTuple):
    """The shape and the dtype of batches."""

    shape: tuple[int | None, ...]
    dtype: np.dtype


class Arrays:
    """Batches of arrays. The order of each pass follows from a seed and the pass number."""

    def __init__(self, arrays: tuple[np.ndarray, ...], batch: int):
        self.arrays, self.batch = arrays, batch
        self.steps = len(arrays[0]) // batch
        self.spec = tuple(Spec((batch, *array.shape[1:]), array.dtype) for array in arrays)

    def settings(self) -> dict[str, Any]:
        """The settings that identify the data."""
        x, y = self.arrays
        return {"x": x, "y": y, "batch_size": self.batch}

    def stream(self, seed: Array, done: int, index: int, count: int) -> Any:
        """The remaining batches after `done` batches; the part of one replica of each."""
        whole, rest = divmod(done, self.steps)
        size, batch = len(self.arrays[0]), self.batch

        def rows(number: Array) -> Array:
            order = random.permutation(random.fold_in(seed, number), size)[: self.steps * batch]
            return ops.reshape(order, (self.steps, batch))[:, index::count]

        return backend.passes(self.arrays, rows, whole, rest)


class Batches:
    """Batches of a `tf.data.Dataset` or of a `Passes`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.spec = dataset.element_spec
        self.steps = max(0, int(dataset.cardinality()))

    def settings(self) -> dict[str, Any]:
        """The settings that identify the dataset, as far as they are known."""
        return {"dataset": [f"{one.dtype.name} {one.shape}" for one in self.spec], "batches": self.steps}

    def stream(self, seed: Array, done: int, index: int, count: int) -> Any:
        """The remaining batches after `done` batches; the part of one replica of each."""
        del seed
        return backend.repeated(self.dataset, done, index, count)


class Passes:
    """Passes over a `PyDataset`, described as a `tf.data.Dataset` describes itself."""

    def __init__(self, data: keras.utils.PyDataset):
        self._data = data
        with plain_errors():
            first = data[0]
        self.element_spec = tuple(Spec((None, *np.shape(part)[1:]), np.asarray(part).dtype) for part in first)

    def cardinality(self) -> int:
        """The number of batches of a pass, or -1."""
        return -1 if self._data.num_batches is None else self._data.num_batches

    def __iter__(self) -> Iterator[Any]:
        count = self._data.num_batches
        self._data.on_epoch_begin()
        for index in itertools.count() if count is None else range(count):
            yield self._data[index]
        self._data.on_epoch_end()


def source(
    name: str, data: Any, batch: int, runner: backend.Runner, expected: Callable[[], Expected], within: str | None = None
) -> Arrays | Batches:
    """Checks data and returns the source of their batches.

    Args:
        name: name of the argument, for messages.
        data: a `tf.data.Dataset` or `PyDataset` of batches (x, y), or a pair of arrays.
        batch: batch size for arrays.
        runner: the runner of the devices, which split each batch.
        expected: returns the data specification of the model.
        within: `name`, if messages should say that x and y belong to it.

    Raises:
        ValueError: if the data have another type, are too few, or fail a check.
    """
    if backend.is_dataset(data) or isinstance(data, keras.utils.PyDataset):
        dataset = checked(data, None, None, expected, within=within)[0]
        if isinstance(data, keras.utils.PyDataset):
            dataset = Passes(dataset)
        if len(dataset.element_spec) != 2:
            raise ValueError(f"`{name}` must give batches (x, y). Received: batches of {len(dataset.element_spec)} parts")
        size = dataset.element_spec[0].shape[0]
        if (size is None and runner.replicas > 1) or (size or 0) % runner.shares:
            raise ValueError(
                f"Batches of `{name}` must be a multiple of the {runner.shares} devices. Received: batches of {size}"
            )
        return Batches(dataset)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(
            f"`{name}` must be a tf.data.Dataset or a PyDataset, or come with labels, as a pair of arrays. "
            f"Received: {type(data).__name__}"
        )
    size = "meta_batch_size" if within else "batch_size"
    arguments.count(size, batch)
    if batch % runner.shares:
        raise ValueError(f"`{size}` must be a multiple of the {runner.shares} devices. Received: {size}={batch}")
    x, y = (np.asarray(one) for one in checked_arrays(data[0], data[1], None, expected(), within)[:2])
    if len(x) < batch:
        raise ValueError(f"`{name}` must hold at least `{size}` examples, {batch}. Received: {len(x)}")
    return Arrays((x.astype(keras.config.floatx()) if x.dtype.kind == "f" else x, y), batch)
